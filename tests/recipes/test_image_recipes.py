"""Transforms of single images."""

import copy
import pickle

import pytest
import torch

from cifarnet.data import InMemoryLoader
from cifarnet.data.augmentation import Augment
from cifarnet.recipes import erasing
from cifarnet.recipes.erasing import RandomErasing
from cifarnet.recipes.jitter import Jitter
from cifarnet.recipes.randaugment import RandAugment
from cifarnet.recipes.trivialaugment import TrivialAugment

IMAGES = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
ALL = [TrivialAugment(), RandAugment(), RandomErasing(), Jitter()]


def augmented(batch_size, transforms, seed=1, augment=None):
    """Return the images of one epoch in the order of the data set."""
    loader = InMemoryLoader(
        IMAGES, torch.arange(40), batch_size, train=True, augment=augment, transforms=transforms, seed=seed
    )
    images, index = (torch.cat(parts) for parts in zip(*[(batch[0], batch[2]) for batch in loader], strict=True))
    return images[index.argsort()]


@pytest.mark.parametrize("transforms", [[one] for one in ALL] + [ALL], ids=lambda chosen: f"{len(chosen)}")
def test_draws_are_a_function_of_seed_epoch_and_index(transforms):
    augment = Augment(2, "random")
    images = augmented(10, transforms, augment=augment)
    assert torch.equal(images, augmented(4, transforms, augment=augment))  # the batch size has no effect
    assert not torch.equal(images, augmented(10, transforms, seed=2, augment=augment))
    assert not torch.equal(images, augmented(10, [], augment=augment))


def test_trivialaugment_draws_operations_and_strengths_uniformly():
    operation, strength = TrivialAugment().draw(140_000, 32, 0, 0)
    assert (operation.bincount() / 10_000 - 1).abs().max() < 0.05
    assert strength[operation == 5].unique().tolist() == pytest.approx([4.5 * level for level in range(-30, 31)])
    assert strength[operation == 10].unique().tolist() == pytest.approx([0.2 * level for level in range(31)], abs=1e-5)
    assert (strength[(operation == 0) | (operation > 11)] == 0).all()


def test_randaugment_uses_one_strength():
    operation, strength = RandAugment(3, 15).draw(1000, 32, 0, 0)
    assert operation.shape == strength.shape == (1000, 3)
    assert strength[operation == 5].unique().tolist() == [-15, 15]
    assert strength[operation == 3].unique().tolist() == pytest.approx([-75 / 331 * 32, 75 / 331 * 32])
    assert strength[operation == 10].unique().tolist() == [2]
    same = RandAugment(1, 0)  # factors of 1, no shift, all bits
    operation = torch.arange(11)[:, None]
    assert torch.equal(same(IMAGES[:11], operation, 0.0 * operation), IMAGES[:11])


def test_erased_boxes_lie_inside_and_have_the_papers_areas():
    place, extent, _ = RandomErasing(prob=0.25).draw(20_000, 32, 0, 0)
    erased = extent[:, 0] > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=0.01)
    assert ((place >= 0) & (place + extent <= 32)).all()
    area = extent[erased].prod(1) / 32**2
    assert area.mean() == pytest.approx(0.21, abs=0.01)  # 0.02 to 0.4, except for boxes that are clipped
    images = torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)
    drawn = torch.tensor([[3, 4], [0, 0]]), torch.tensor([[20, 10], [0, 0]]), torch.tensor([5, 6])
    changed = RandomErasing()(images, *drawn)
    assert torch.equal(changed[1], images[1])
    hole = changed[0, :, 3:23, 4:14].clone()
    changed[0, :, 3:23, 4:14] = 7
    assert torch.equal(changed, images)
    assert hole.float().mean() == pytest.approx(127.5, abs=10)
    assert hole.float().std() == pytest.approx(73.9, abs=6)


@pytest.mark.parametrize("copied", [lambda erasing: erasing, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_noise_is_drawn_once_and_does_not_depend_on_copies(monkeypatch, copied):
    drawn, begin = [], erasing.generator
    monkeypatch.setattr(erasing, "generator", lambda *of: drawn.append(of) or begin(*of))
    recipe = RandomErasing()
    for size in (16, 16, 8):
        recipe, images = copied(recipe), torch.zeros(3, 3, size, size, dtype=torch.uint8)
        start, whole = torch.tensor([0, 70, erasing.ROW - 1]), torch.full((3, 2), size)
        row = torch.randint(256, (erasing.ROW + 3 * size**2,), dtype=torch.uint8, generator=begin(0, 0, "noise"))
        for image, first in zip(recipe(images, torch.zeros(3, 2), whole, start), start, strict=True):
            assert torch.equal(image.flatten(), row[first : first + image.numel()])
    assert len(drawn) == 2  # once for each image size


def test_jitter_multiplies_brightness_then_contrast():
    images = torch.tensor([[[[100, 200]]] * 3]).squeeze(2).to(torch.uint8).view(1, 3, 1, 2)
    # brightness: 50 and 100; half of the contrast around their mean, 75, up to rounding
    changed = Jitter()(images, torch.tensor([0.5]), torch.tensor([0.5]))
    assert changed[0, 0, 0].tolist() == pytest.approx([62, 87], abs=1)
    for x, factors in zip((0.2, 0.4), Jitter(0.2, 0.4).draw(5000, 32, 0, 0), strict=True):
        assert (factors.min(), factors.max()) == (pytest.approx(1 - x, abs=0.01), pytest.approx(1 + x, abs=0.01))
        assert (factors - 1).abs().max() <= x
        assert factors.mean() == pytest.approx(1, abs=0.01)
