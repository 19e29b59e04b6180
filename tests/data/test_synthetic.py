import numpy as np
import pytest
import torch

from cifarnet.data import Synthetic
from cifarnet.data.synthetic import synthesize


def test_a_picture_is_a_function_of_seed_and_index():
    few, many = synthesize(np.array([3, 14, 159])), synthesize(np.arange(200))
    assert torch.equal(few.images, many.images[[3, 14, 159]])
    assert few.labels.tolist() == [3, 4, 9]
    assert not torch.equal(few.images, synthesize(np.array([3, 14, 159]), seed=1).images)
    assert few.images.shape == (3, 3, 32, 32)
    assert few.images.dtype == torch.uint8


def test_splits_do_not_share_pictures_and_are_balanced():
    data = Synthetic(train_size=500, test_size=100)
    splits = (data.source.train, data.source.val, data.source.test)
    assert len({image.numpy().tobytes() for split in splits for image in split.images}) == 600
    assert data.source.val.labels.bincount().tolist() == [5] * 10
    assert data.source.test.labels.bincount().tolist() == [10] * 10


@pytest.mark.slow
def test_softmax_regression_on_pixels_is_not_enough():
    data = Synthetic(train_size=5_000)
    train, val = data.source.train, data.source.val
    torch.manual_seed(0)
    model = torch.nn.Linear(3 * 32 * 32, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pixels, val_pixels = (split.images.flatten(1).float() / 255 - 0.5 for split in (train, val))
    best = 0.0
    for _ in range(15):
        for index in torch.randperm(len(train)).split(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels[index]), train.labels[index]).backward()
            optimizer.step()
        best = max(best, (model(val_pixels).argmax(1) == val.labels).float().mean().item())
    assert 0.1 < best < 0.6
