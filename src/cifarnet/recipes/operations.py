"""The fourteen operations of automatic augmentation, of many images at once, each with a strength of its own.

They are torchvision's (and Pillow's), which take one strength for all: tests/recipes/test_operations.py compares.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

MOVES = ["identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"]  # the colors stay as they are
SIGNED = range(1, 10)  # the operations whose strength may be negative


def either_way(operation: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """The strength times the sign, 1 or -1, where the operation's may be negative; all of one shape."""
    signed = (operation >= SIGNED.start) & (operation < SIGNED.stop)
    return strength * torch.where(signed, sign, 1)


def apply(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Each image, uint8 [B, 3, H, W], changed by its operation, int64 [B] (a place in NAMES).

    The strength, float32 [B], is: of a shear, pixels a pixel; of a translation, pixels; of a rotation, degrees; of
    brightness, color, contrast and sharpness, what is added to a factor of 1; of posterize, bits that are dropped; of
    solarize, the part of all levels that is inverted.
    """
    if images.device.type != "cpu":
        return apply_all(images, operation, strength)
    order = operation.argsort(stable=True)
    groups = order.split(operation.bincount(minlength=len(NAMES)).tolist())
    changed = images.clone()
    if len(moved := torch.cat(groups[1 : len(MOVES)])):
        changed[moved] = _moved(images[moved], operation[moved], strength[moved])
    for change, members in zip(CHANGES.values(), groups[len(MOVES) :], strict=True):
        if len(members):
            changed[members] = change(images[members], strength[members, None, None, None])
    return changed


def apply_all(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """As `apply`, by every operation on all images: more work, but the host need not wait for a GPU to count."""
    changed = _moved(images, operation, strength)  # the others stay where they are
    for number, change in enumerate(CHANGES.values(), len(MOVES)):
        result = change(images, strength[:, None, None, None])
        changed = torch.where((operation == number)[:, None, None, None], result, changed)
    return changed


def _moved(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Sheared about the upper left corner, translated, or rotated about the middle; from outside comes black."""
    count, channels, height, width = images.shape
    shear_x, shear_y, right, down, degrees = (
        torch.where(operation == number, strength, 0)[:, None, None] for number in range(1, len(MOVES))
    )
    angle = degrees.deg2rad()
    y = torch.arange(height, device=images.device)[:, None] + 0.5  # the middles of pixels
    x = torch.arange(width, device=images.device) + 0.5
    cos, sin, from_x, from_y = angle.cos(), angle.sin(), x - width / 2, y - height / 2
    column = (cos * from_x - sin * from_y + width / 2 + shear_x * y - right.trunc()).floor().long()
    row = (sin * from_x + cos * from_y + height / 2 + shear_y * x - down.trunc()).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    first = torch.arange(count, device=images.device)[:, None, None] * height
    source = (first + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, source.flatten())
    return (pixels.view(count, height, width, channels) * inside[..., None]).permute(0, 3, 1, 2)


def blend(images: Tensor, others: Tensor | float, factor: Tensor) -> Tensor:
    """factor × images + (1 - factor) × others, as uint8; the factor, [B, 1, 1, 1], may be above 1."""
    return (images + (factor - 1) * (images - others)).clamp(0, 255).to(torch.uint8)  # exact where both are equal


def grey(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W], whole numbers."""
    red, green, blue = images.float().split(1, 1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()


def _sharpen(images: Tensor, strength: Tensor) -> Tensor:
    """Blend images with blurred ones, of the kernel 1/13 with 5/13 at its center; border pixels stay."""
    smooth = images.float()
    inner = smooth[..., 1:-1, 1:-1]
    three = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
    inner.copy_(((nine + 4 * inner) / 13).round())
    return blend(images, smooth, 1 + strength)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of colors: images, strength [B, 1, 1, 1] -> images
    "brightness": lambda images, strength: blend(images, 0.0, 1 + strength),
    "color": lambda images, strength: blend(images, grey(images), 1 + strength),
    "contrast": lambda images, strength: blend(images, grey(images).mean((1, 2, 3), keepdim=True), 1 + strength),
    "sharpness": _sharpen,
    "posterize": lambda images, strength: images & (256 - 2 ** strength.round()).to(torch.uint8),
    "solarize": lambda images, strength: torch.where(images >= 255 * (1 - strength), 255 - images, images),
    "autocontrast": lambda images, _: TF.autocontrast(images),
    "equalize": lambda images, _: TF.equalize(images),
}
NAMES = [*MOVES, *CHANGES]
