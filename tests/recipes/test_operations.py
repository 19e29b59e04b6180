import pytest
import torch
from torchvision.transforms.v2 import TrivialAugmentWide

from cifarnet.recipes.operations import NAMES, SIGNED, apply, apply_all

IMAGES = torch.randint(0, 256, (12, 3, 32, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES[1::2] = IMAGES[1::2] // 3 + 50  # of low contrast
THEIRS = dict(zip(NAMES, TrivialAugmentWide._AUGMENTATION_SPACE, strict=True))


def as_theirs(name, strength):
    return {"posterize": 8 - strength, "solarize": 1 - strength}.get(name, strength)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0, 0.3, 1.0, -0.3, -1.0])
def test_operations_equal_those_of_torchvision(name, share):
    number = NAMES.index(name)
    strength = [0, 0.99, 0.99, 20, 20, 135, 0.99, 0.99, 0.99, 0.99, 6, 1, 0, 0][number] * share
    if share < 0 and number not in SIGNED:
        return
    strength = round(strength) if name == "posterize" else strength
    ours = apply(IMAGES, torch.full((12,), number), torch.full((12,), float(strength)))
    theirs = TrivialAugmentWide()._apply_image_or_video_transform(
        IMAGES,
        THEIRS[name],
        as_theirs(name, strength),
        interpolation=TrivialAugmentWide().interpolation,
        fill={torch.Tensor: None},
    )
    assert ours.dtype == torch.uint8
    if 1 <= number <= 5:  # sometimes two neighbors are equally near
        assert (ours == theirs).float().mean() > 0.97
    else:
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert (ours == theirs).float().mean() > 0.99


def test_each_image_gets_its_operation():
    operation = torch.arange(12) + 2
    strength = torch.tensor([0.5, 3, -4, 45, 0.5, -0.5, 0.2, 0.9, 3, 0.4, 0, 0])
    together = apply(IMAGES, operation, strength)
    for one in range(12):
        assert torch.equal(together[one : one + 1], apply(IMAGES[one:][:1], operation[one:][:1], strength[one:][:1]))


def test_apply_all_equals_apply():
    random = torch.Generator().manual_seed(1)
    operation = torch.arange(len(NAMES)).repeat(8)
    images = torch.randint(0, 256, (len(operation), 3, 32, 24), generator=random, dtype=torch.uint8)
    strength = torch.rand(len(operation), generator=random)
    strength *= torch.tensor([0, 0.99, 0.99, 20, -20, 135, 0.99, -0.99, 0.99, 0.99, 6, 1, 0, 0]).repeat(8)
    assert torch.equal(apply_all(images, operation, strength), apply(images, operation, strength))
