import numpy as np
import pytest
import torch

from cifarnet.data.loader import Batch
from cifarnet.data.synthetic import synthesize
from cifarnet.evaluation import robustness

IMAGES = synthesize(np.arange(40)).images


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5)])
def test_small_images(size):
    for name, images in robustness.examples(torch.zeros(3, *size, dtype=torch.uint8), seed=0).items():
        assert images.shape == (5, 3, *size), name


def batches(size):
    index = torch.arange(len(IMAGES))
    return [Batch(IMAGES[part], part % 10, part) for part in index.split(size)]


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_corruptions_grow_and_repeat(name):
    distances = []
    for severity in range(1, robustness.SEVERITIES + 1):
        state = torch.get_rng_state()
        corrupted, again = (
            torch.cat([batch.images for batch in robustness.Corrupted(batches(size), name, severity, seed=0)])
            for size in (16, 32)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(corrupted, again)  # the batch size does not matter
        assert (corrupted.dtype, corrupted.shape) == (torch.uint8, IMAGES.shape)
        distances.append((corrupted.float() - IMAGES.float()).square().mean().item())
    assert distances == sorted(set(distances))
    assert distances[0] > 0


def test_noise_depends_on_the_seed_and_the_image():
    one, other = ([batch.images for batch in robustness.Corrupted(batches(20), "noise", 3, seed)] for seed in (0, 1))
    assert not torch.equal(one[0], other[0])
    noise = [images.int() - clean.images.int() for images, clean in zip(one, batches(20), strict=True)]
    assert not torch.equal(*noise)


def test_severities_have_independent_noise():
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    batch = Batch(grey, torch.zeros(4), torch.arange(4))
    noise = torch.stack(
        [next(iter(robustness.Corrupted([batch], "noise", severity, 0))).images.flatten() for severity in range(1, 6)]
    ).double()
    correlation = noise.corrcoef() - torch.eye(5)
    assert correlation.abs().max() < 0.1  # the standard deviation of 12,288 values is 0.009


def test_labels_and_index_are_unchanged():
    clean, corrupted = batches(16), robustness.Corrupted(batches(16), "blur", 2, seed=0)
    assert len(corrupted) == len(clean) == 3
    for before, after in zip(clean, corrupted, strict=True):
        assert torch.equal(before.labels, after.labels)
        assert torch.equal(before.index, after.index)


def test_examples_equal_the_tested_images():
    shown = robustness.examples(IMAGES[0], seed=4)
    assert list(shown) == list(robustness.CORRUPTIONS)
    assert all(images.shape == (5, 3, 32, 32) for images in shown.values())
    for name in ("noise", "JPEG"):
        tested = next(iter(robustness.Corrupted(batches(1), name, 5, seed=4))).images
        assert torch.equal(shown[name][4], tested[0])
