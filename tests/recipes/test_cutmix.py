import pytest
import torch
from lightning.pytorch.callbacks import Callback

from cifarnet.config import validate
from cifarnet.errors import UserError
from cifarnet.recipes.cutmix import CutMix
from cifarnet.train import train


def grey(*values):
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_a_box_is_the_partners_and_its_area_is_the_labels_weight():
    """λ = 3/4: half of the side, 2 of 4 pixels; the second box is clipped at a corner; the third image has no box."""
    centers = torch.tensor([[0.5, 0.5], [0.0, 0.99], [0.5, 0.5]])
    cut = torch.tensor([True, True, False])
    mixed, lam = CutMix()(grey(1, 1, 1), grey(2, 2, 2), torch.tensor([0.75, 0.75, 1.0]), cut, centers)
    assert mixed[0, 0].tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1]]
    assert mixed[1, 0].tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (mixed[2] == 1).all()
    assert torch.equal(mixed[:, 0], mixed[:, 2])
    assert mixed.dtype == torch.uint8
    assert lam.tolist() == [1 - 4 / 16, 1 - 2 / 16, 1]


def test_images_without_a_box_are_blended_with_mixup_alpha():
    draws = torch.tensor([0.75, 0.75]), torch.tensor([True, False]), torch.full((2, 2), 0.5)
    mixed, lam = CutMix(mixup_alpha=0.2)(grey(0, 0), grey(100, 100), *draws)
    assert mixed[0, 0].unique().tolist() == [0, 100]
    assert mixed[1, 0].unique().tolist() == [25]
    assert lam.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("mixup_alpha", [None, 1.0])
def test_draws_are_a_function_of_seed_epoch_and_index(mixup_alpha):
    mix = CutMix(prob=0.3, mixup_alpha=mixup_alpha)
    first, same, other = (mix.draw(2000, 32, seed, epoch) for seed, epoch in [(0, 1), (0, 1), (0, 2)])
    assert all(torch.equal(*pair) for pair in zip(first, same, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))
    _, lam, cut, _ = first
    assert cut.float().mean() == pytest.approx(0.3, abs=0.04)
    assert lam[cut].mean() == pytest.approx(0.5, abs=0.05)  # Beta(1, 1)
    assert (lam[~cut] == 1).all() == (mixup_alpha is None)


@pytest.mark.parametrize("order", ["mixup,cutmix", "cutmix,mixup"])
def test_cutmix_and_mixup_together_are_refused(config, order):
    with pytest.raises(UserError, match=r"data\.mix\.(cutmix_)?alpha="):
        validate(config(f"+recipe=[{order}]"))


class Observed(Callback):
    """Records the partners and the loss of each batch, and the mean loss that the loader observed."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        losses = trainer.train_dataloader._observed[batch.index]
        self.batches.append((batch.partners, outputs["loss"].item(), losses.mean().item()))


@pytest.mark.parametrize("recipe", ["cutmix", "mixup"])
def test_the_hardest_images_are_chosen_by_losses_of_mixed_images(config, recipe):
    observed = Observed()
    train(config(f"+recipe={recipe}", "data.hardest_share=0.7"), callbacks=[observed])
    assert len(observed.batches) == 2 * int(0.7 * 180 / 32)
    for partners, loss, mean in observed.batches:
        assert partners is not None
        assert mean == pytest.approx(loss)
