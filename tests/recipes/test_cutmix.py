import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.config import validate
from cifarnet.errors import UserError
from cifarnet.recipes.cutmix import CutMix
from cifarnet.train import train


def grey(*values):
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_a_rectangle_is_the_partners_and_its_area_is_the_label():
    """λ = 3/4: half the side, 2 of 4 pixels, by hand; a corner cuts it; an image that is not cut stays."""
    middles = torch.tensor([[0.5, 0.5], [0.0, 0.99], [0.5, 0.5]])
    cut = torch.tensor([True, True, False])
    mixed, own = CutMix()(grey(1, 1, 1), grey(2, 2, 2), torch.tensor([0.75, 0.75, 1.0]), cut, middles)
    assert mixed[0, 0].tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1]]
    assert mixed[1, 0].tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (mixed[2] == 1).all()
    assert torch.equal(mixed[:, 0], mixed[:, 2])
    assert mixed.dtype == torch.uint8
    assert own.tolist() == [1 - 4 / 16, 1 - 2 / 16, 1]


def test_images_that_are_not_cut_are_blended_if_asked_to():
    drawn = torch.tensor([0.75, 0.75]), torch.tensor([True, False]), torch.full((2, 2), 0.5)
    mixed, own = CutMix(mixup_alpha=0.2)(grey(0, 0), grey(100, 100), *drawn)
    assert mixed[0, 0].unique().tolist() == [0, 100]
    assert mixed[1, 0].unique().tolist() == [25]
    assert own.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("mixup_alpha", [None, 1.0])
def test_draws_are_a_function_of_seed_epoch_and_index(mixup_alpha):
    mix = CutMix(prob=0.3, mixup_alpha=mixup_alpha)
    first, same, other = (mix.draw(2000, 32, seed, epoch) for seed, epoch in [(0, 1), (0, 1), (0, 2)])
    assert all(torch.equal(*pair) for pair in zip(first, same, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))
    _, weight, cut, _ = first
    assert cut.float().mean() == pytest.approx(0.3, abs=0.04)
    assert weight[cut].mean() == pytest.approx(0.5, abs=0.05)  # Beta(1, 1)
    assert (weight[~cut] == 1).all() == (mixup_alpha is None)


@pytest.mark.parametrize("order", ["mixup,cutmix", "cutmix,mixup"])
def test_cutmix_and_mixup_as_two_recipes_are_refused(config, order):
    with pytest.raises(UserError, match=r"data\.mix\.(cutmix_)?alpha="):
        validate(config(f"+recipe=[{order}]"))


class Noted(Callback):
    """Of each batch, how many tensors it has, its loss, and what the loader has noted of its images."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        noted = trainer.train_dataloader._observed[batch.index]
        self.batches.append((batch.partners, outputs["loss"].item(), noted.mean().item()))


@pytest.mark.parametrize("recipe", ["cutmix", "mixup"])
def test_the_hardest_images_are_chosen_by_their_losses_as_mixed(config, recipe):
    noted = Noted()
    train(config(f"+recipe={recipe}", "data.hardest_share=0.7"), callbacks=[noted])
    assert len(noted.batches) == 2 * int(0.7 * 180 / 32)
    for partners, loss, mean in noted.batches:
        assert partners is not None
        assert mean == pytest.approx(loss)
