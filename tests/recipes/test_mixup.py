import json

import pytest
import torch

from cifarnet.data import InMemoryLoader
from cifarnet.data.augmentation import Augment
from cifarnet.recipes.mixup import Mixup
from cifarnet.train import train


def test_images_and_labels_are_mixed_with_the_same_weight():
    """Each image has one color, which is its label, so that the mixed color gives lam."""
    labels = torch.arange(0, 200, 10)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    loader = InMemoryLoader(images, labels, 5, train=True, augment=Augment(2, "random"), mix=Mixup(1.0), seed=3)
    seen = []
    for batch in loader:
        mixed, lam = batch.images, batch.lam
        assert torch.equal(batch.labels, labels[batch.index])
        expected = (lam * batch.labels + (1 - lam) * batch.partners).round()
        assert mixed.dtype == torch.uint8
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mixed.float(), expected.view(-1, 1, 1, 1).expand(mixed.shape), rtol=0, atol=1)
        seen += lam.tolist()
    assert len(seen) == 20
    assert max(seen) - min(seen) > 0.5
    assert next(iter(InMemoryLoader(images, labels, 5, mix=Mixup()))).partners is None  # evaluation does not mix


def test_draws_are_a_function_of_seed_epoch_and_index():
    mix = Mixup(0.2)
    first, same, other = (mix.draw(1000, 32, seed, epoch) for seed, epoch in [(0, 1), (0, 1), (0, 2)])
    assert all(torch.equal(*pair) for pair in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    _, weight = first
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert weight.mean() == pytest.approx(0.5, abs=0.05)
    assert weight.var() == pytest.approx(1 / (4 * 1.4), abs=0.02)


def test_the_recipe_changes_training(config, tmp_path):
    train(config("+recipe=mixup", "data.mix.alpha=1", folder="mixed"))
    train(config(folder="plain"))
    mixed, plain = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("mixed", "plain"))
    assert mixed["resolved"]["data"]["mix"]["alpha"] == 1
    assert mixed["history"][0]["train/cross_entropy"] != plain["history"][0]["train/cross_entropy"]
