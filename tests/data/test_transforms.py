"""Transforms of torchvision, which are applied to one image after the other."""

import random
import re

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from torchvision.transforms import v2

from cifarnet.build import build, make_data
from cifarnet.config import validate
from cifarnet.data import InMemoryLoader
from cifarnet.data.transforms import PerImage
from cifarnet.errors import UserError
from cifarnet.seeding import generator

COUNT = 24
JITTER = v2.ColorJitter(0.5, 0.5)
PLAIN = ["data.crop_padding=0", "data.flip=none"]


@pytest.fixture
def images():
    return torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(images, *transforms, batch_size=8, epoch=0, **settings):
    loader = InMemoryLoader(
        images, torch.arange(len(images)), batch_size, train=True, transforms=transforms, seed=3, **settings
    )
    loader.set_epoch(epoch)
    return list(loader)


def by_index(batches):
    return {index: image for batch in batches for index, image in zip(batch.index.tolist(), batch.images, strict=True)}


@pytest.mark.parametrize("epoch", [0, 1])
def test_each_image_has_its_own_seed(images, epoch):
    found = by_index(batches(images, PerImage("jitter", JITTER), epoch=epoch))
    seeds = torch.randint(2**63 - 1, (COUNT,), generator=generator(3, epoch, "transform jitter")).tolist()
    assert len(found) == COUNT
    for index, image in found.items():
        torch.manual_seed(seeds[index])
        assert torch.equal(image, JITTER(images[index]))


def test_the_result_does_not_depend_on_batches_or_ranks_and_leaves_other_random_numbers(images):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = by_index(batches(images, PerImage("jitter", JITTER)))
    parts = [batches(images, PerImage("jitter", JITTER), rank=rank, world_size=2) for rank in (0, 1)]
    for others in (batches(images, PerImage("jitter", JITTER), batch_size=6), parts[0] + parts[1]):
        assert all(torch.equal(image, whole[index]) for index, image in by_index(others).items())
    assert torch.equal(torch.get_rng_state(), state)
    other_epoch = by_index(batches(images, PerImage("jitter", JITTER), epoch=1))
    assert not all(torch.equal(image, whole[index]) for index, image in other_epoch.items())


def test_transforms_with_different_names_are_independent(images):
    rows = torch.stack([PerImage(name, JITTER).draw(COUNT, 8, 0, 0)[0] for name in ("one", "other")])
    assert len(rows.unique()) == 2 * COUNT


CHOSEN = {
    "v1": "{_target_: torchvision.transforms.RandomHorizontalFlip, p: 1.0}",
    "v2": "{_target_: torchvision.transforms.v2.RandomHorizontalFlip, p: 1.0}",
    "composed": (
        "{_target_: torchvision.transforms.v2.Compose, transforms: "
        "[{_target_: torchvision.transforms.v2.RandomHorizontalFlip, p: 1.0}, "
        "{_target_: torchvision.transforms.v2.RandomAffine, degrees: [0, 0], fill: [1, 2, 3]}]}"
    ),
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_transforms_in_a_config(config, kind):
    data = build(config(*PLAIN, f"data.transforms={{mine: {CHOSEN[kind]}}}")).data
    for index, image in by_index(data.train_dataloader()).items():
        assert torch.equal(image, data.source.train.images[index].flip(-1))


def test_a_run_that_was_stopped_equals_one_that_was_not(resumed_run):
    jitter = "data.transforms={mine: {_target_: torchvision.transforms.v2.ColorJitter, brightness: 0.5}}"
    resumed_run(jitter, moment=(0, 2))


class Noise:
    """Draws from the generators of Python and NumPy, as RandomChoice of torchvision's first version does."""

    def __call__(self, image):
        return image ^ (random.randrange(256) ^ np.random.randint(256))  # noqa: NPY002


def test_every_generator_is_seeded_and_restored(images):
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (torch.cat([batch.images for batch in batches(images, PerImage("x", Noise()))]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(map(int, (first ^ torch.cat([b.images for b in batches(images)]))[:, 0, 0, 0]))) > COUNT / 2
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("transform", "problem"),
    [
        ("{_target_: torchvision.transforms.ToTensor}", "(ToTensor) cannot be used: pic should be"),
        ("{_target_: torchvision.transforms.v2.Resize, size: 16}", "it returned Tensor torch.uint8 [3, 16, 16]"),
        ("{_target_: torchvision.transforms.v2.Grayscale}", "it returned Tensor torch.uint8 [1, 32, 32]"),
        ("{_target_: torchvision.transforms.v2.ToPILImage}", "it returned Image"),
        ("{_target_: torchvision.transforms.Normalize, mean: [0.5], std: [0.5]}", "(Normalize) cannot be used"),
    ],
)
def test_transforms_that_change_the_type_or_the_shape_are_refused(config, transform, problem):
    loader = build(config(f"data.transforms={{mine: {transform}}}")).data.train_dataloader()
    with pytest.raises(UserError, match=r"^data\.transforms\.mine .*uint8 \[3, 32, 32\].*Normalize") as error:
        next(iter(loader))
    assert problem in str(error.value)


def test_other_values_are_refused_at_the_start(config):
    with pytest.raises(UserError, match=r"data\.transforms\.mine=3 has no _target_"):
        validate(config("data.transforms={mine: 3}"))
    with pytest.raises(InstantiationException) as error:
        make_data(config("data.mix={_target_: torchvision.transforms.v2.MixUp, num_classes: 10}"))
    assert isinstance(error.value.__cause__, UserError)  # reported in one sentence
    assert re.search(r"data\.mix=MixUp .*recipe=mixup", str(error.value.__cause__))
