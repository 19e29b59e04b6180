import numpy as np
import pytest
import torch

from cifarnet.data.synthetic import synthesize
from cifarnet.evaluation import robustness

IMAGES = synthesize(np.arange(40)).images


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5)])
def test_small_images_can_be_corrupted_too(size):
    for name, images in robustness.examples(torch.zeros(3, *size, dtype=torch.uint8), seed=0).items():
        assert images.shape == (5, 3, *size), name


def batches(size):
    """With more behind the images: labels, index, …"""
    places = torch.arange(len(IMAGES))
    return list(zip(*(values.split(size) for values in (IMAGES, places % 10, places, places / 2)), strict=True))


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_corruptions_grow_and_repeat(name):
    distances = []
    for severity in range(1, robustness.SEVERITIES + 1):
        state = torch.get_rng_state()
        corrupted, again = (
            torch.cat([images for images, *_ in robustness.Corrupted(batches(size), name, severity, seed=0)])
            for size in (16, 32)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(corrupted, again)  # whatever the batches
        assert (corrupted.dtype, corrupted.shape) == (torch.uint8, IMAGES.shape)
        distances.append((corrupted.float() - IMAGES.float()).square().mean().item())
    assert distances == sorted(set(distances))
    assert distances[0] > 0


def test_noise_depends_on_the_seed_and_the_image():
    one, other = ([batch[0] for batch in robustness.Corrupted(batches(20), "noise", 3, seed)] for seed in (0, 1))
    assert not torch.equal(one[0], other[0])
    noise = [images.int() - clean.int() for images, (clean, *_) in zip(one, batches(20), strict=True)]
    assert not torch.equal(*noise)


def test_every_severity_has_noise_of_its_own():
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    noise = torch.stack(
        [next(iter(robustness.Corrupted([(grey,)], "noise", severity, 0)))[0].flatten() for severity in range(1, 6)]
    ).double()
    likeness = noise.corrcoef() - torch.eye(5)
    assert likeness.abs().max() < 0.1  # 12,288 values: their own deviation is 0.009


def test_what_belongs_to_the_images_stays_with_them():
    clean, corrupted = batches(16), robustness.Corrupted(batches(16), "blur", 2, seed=0)
    assert len(corrupted) == len(clean) == 3
    for (_, *before), (_, *after) in zip(clean, corrupted, strict=True):
        assert len(after) == 3
        assert all(map(torch.equal, before, after))


def test_examples_show_the_first_image_as_it_is_tested():
    shown = robustness.examples(IMAGES[0], seed=4)
    assert list(shown) == list(robustness.CORRUPTIONS)
    assert all(images.shape == (5, 3, 32, 32) for images in shown.values())
    for name in ("noise", "JPEG"):
        tested = next(iter(robustness.Corrupted([(IMAGES[:1],)], name, 5, seed=4)))[0]
        assert torch.equal(shown[name][4], tested[0])
