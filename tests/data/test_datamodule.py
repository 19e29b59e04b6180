import torch

from cifarnet.build import build


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
