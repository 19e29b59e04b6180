import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cifarnet.build import build
from cifarnet.errors import UserError


def test_a_hole_has_the_mean_color_which_is_normalized_to_zero(config):
    _, classifier, data, _ = build(config("data.cutout=9"))
    loader = data.train_dataloader()
    images, _, index, *_ = next(iter(loader))
    *_, middles = loader.augment.draw(180, size=32, seed=0, epoch=0)
    row, column = middles[index].unbind(1)
    in_holes = images[torch.arange(len(images)), :, row, column]
    mean = data.source.train.images.double().mean((0, 2, 3))
    assert torch.equal(in_holes, mean.round().to(torch.uint8).expand_as(in_holes))
    assert classifier.network.normalize(in_holes[..., None, None]).abs().max() < 0.03  # rounded


class Dictionaries(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": torch.zeros(3, 32, 32), "label": index % 2}


@pytest.mark.parametrize("task", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8)),
        TensorDataset(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8), torch.arange(8)),
        Dictionaries(),
    ],
    ids=["pairs", "triples", "dictionaries"],
)
def test_loaders_that_yield_no_batches_are_refused(config, task, dataset):
    trainer, classifier, *_ = build(config("scheduler=constant"))
    with pytest.raises(UserError, match=r"images \(uint8 \[B, 3, H, W\]\), labels .* index .*InMemoryLoader"):
        getattr(trainer, task)(classifier, DataLoader(dataset, 4))
