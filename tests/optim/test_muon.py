import pytest
import torch
from torch import nn

from cifarnet.optim.muon import Muon, orthogonalize


def published(matrix, steps):
    """The published Newton-Schulz iteration for one matrix, in the precision of the matrix."""
    x = matrix / (matrix.norm() + 1e-7)
    if len(x) > len(x.T):
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(matrix) > len(matrix.T) else x


@pytest.mark.parametrize(
    ("shape", "steps"), [((8, 3, 3, 3), 3), ((40, 4, 3, 3), 3), ((6, 6, 1, 1), 3), ((8, 3, 3, 3), 1), ((8, 3, 3, 3), 5)]
)
def test_steps_equal_the_published_formula_in_float64(shape, steps):
    random = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))
    expected, buffer = weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, momentum=0.6, steps=steps)
    for _ in range(4):
        weight.grad = torch.randn(shape, generator=random, dtype=torch.float64)
        buffer = 0.6 * buffer + weight.grad
        update = published((weight.grad + 0.6 * buffer).flatten(1), steps).view(shape)
        expected = expected * (shape[0] ** 0.5 / expected.norm()) - 0.1 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 27), (40, 9)])
def test_singular_values_move_towards_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix[None].double(), steps=5))
    assert values.min() > 0.5
    assert values.max() < 1.5
    in_bfloat16 = orthogonalize(matrix[None], steps=3)[0].float()
    torch.testing.assert_close(in_bfloat16, published(matrix.double(), 3).float(), rtol=0.1, atol=0.02)


def test_orthogonalizing_together_equals_one_by_one():
    random = torch.Generator().manual_seed(2)
    shapes = [(8, 4, 3, 3), (8, 8, 3, 3), (8, 4, 3, 3), (12, 8, 3, 3), (8, 4, 3, 3)]
    start = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes] for _ in range(3)]

    def train(together):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizers = [Muon(weights)] if together else [Muon([weight]) for weight in weights]
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        return weights

    for one, other in zip(train(together=True), train(together=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_biases_and_matrices_are_updated_by_sgd():
    random = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=random) for shape in [(5,), (7, 5), ()]]
    bias, matrix = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    muon = Muon(ours, bias=bias, matrix=matrix)
    groups = [{"params": [theirs[0], theirs[2]], **bias}, {"params": [theirs[1]], **matrix}]
    sgd = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        muon.step()
        sgd.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_defaults():
    convolution, bias, matrix = Muon(
        nn.Parameter(torch.zeros(shape)) for shape in [(2, 2, 1, 1), (2,), (2, 2)]
    ).param_groups
    usual = {"lr": 0.24, "momentum": 0.6, "weight_decay": 0.0, "steps": 3}
    assert {name: convolution[name] for name in usual} == usual
    sgd = {"lr": 0.01, "momentum": 0.85, "weight_decay": 0.0}
    assert [{name: group[name] for name in sgd} for group in (bias, matrix)] == [sgd, sgd]
    assert Muon([nn.Parameter(torch.zeros(2))], bias={"lr": 0.5}).param_groups[0]["momentum"] == 0.85
    matrices = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(orthogonalize(matrices), orthogonalize(matrices, 3))


def test_float32_goes_through_bfloat16_and_comes_back():
    random = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.randn(8, 4, 3, 3, generator=random))
    weight.grad = torch.randn(8, 4, 3, 3, generator=random)
    matrix = (1.6 * weight.grad).permute(0, 2, 3, 1).flatten(1)
    halves = orthogonalize(matrix[None])[0]
    assert halves.dtype == torch.bfloat16
    update = halves.float().view(8, 3, 3, 4).permute(0, 3, 1, 2)
    expected = weight.detach() * (8**0.5 / weight.detach().norm()) - 0.24 * update
    Muon([weight]).step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_negative_rates_are_refused():
    with pytest.raises(ValueError, match="matrix: lr=-1"):
        Muon([nn.Parameter(torch.zeros(3))], matrix={"lr": -1})
