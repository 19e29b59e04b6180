"""The fourteen operations of automatic augmentation, applied to many images with separate strengths.

The results equal the results of torchvision and Pillow, which apply the same strength to all images
(tests/recipes/test_operations.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

MOVES = ["identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"]  # colors do not change
SIGNED = range(1, 10)  # the operations whose strength may be negative


def draw_strengths(operation: Tensor, level: Tensor | float, most: list[float], random: torch.Generator) -> Tensor:
    """Return level × the largest strength of each operation, float32, with a random sign if it may be negative.

    Args:
        operation: indices of NAMES, int64 of any shape.
        level: numbers from 0 to 1, of the shape of `operation`, or one number.
        most: the largest strength of each operation in NAMES.
    """
    sign = torch.randint(2, operation.shape, generator=random) * 2 - 1
    signed = (operation >= SIGNED.start) & (operation < SIGNED.stop)
    return level * torch.tensor(most)[operation] * torch.where(signed, sign, 1)


def apply(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: the images, uint8 [B, 3, H, W].
        operation: indices of NAMES, int64 [B].
        strength: the strengths, float32 [B]: pixels per pixel for shears, pixels for translations, degrees for
            rotation, the factor minus 1 for brightness, color, contrast and sharpness, the number of dropped bits for
            posterize, and the fraction of inverted levels for solarize.
    """
    if images.device.type != "cpu":
        return apply_all(images, operation, strength)
    order = operation.argsort(stable=True)
    groups = order.split(operation.bincount(minlength=len(NAMES)).tolist())
    changed = images.clone()
    if len(moving := torch.cat(groups[1 : len(MOVES)])):
        changed[moving] = _move(images[moving], operation[moving], strength[moving])
    for change, members in zip(CHANGES.values(), groups[len(MOVES) :], strict=True):
        if len(members):
            changed[members] = change(images[members], strength[members, None, None, None])
    return changed


def apply_all(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply every operation to all images, with the same result as `apply`. A GPU has more work, but the host does not
    wait for it."""
    changed = _move(images, operation, strength)  # images with other operations are not changed
    for number, change in enumerate(CHANGES.values(), len(MOVES)):
        result = change(images, strength[:, None, None, None])
        changed = torch.where((operation == number)[:, None, None, None], result, changed)
    return changed


def _move(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Shear images about the upper left corner, translate them, or rotate them about the center; fill with black."""
    count, channels, height, width = images.shape
    shear_x, shear_y, right, down, degrees = (
        torch.where(operation == number, strength, 0)[:, None, None] for number in range(1, len(MOVES))
    )
    angle = degrees.deg2rad()
    y = torch.arange(height, device=images.device)[:, None] + 0.5  # pixel centers
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
    """Return factor × images + (1 - factor) × others as uint8; the factor, [B, 1, 1, 1], may be above 1."""
    return (images + (factor - 1) * (images - others)).clamp(0, 255).to(torch.uint8)  # exact if both are equal


def gray(images: Tensor) -> Tensor:
    """Convert [B, 3, H, W] to gray values [B, 1, H, W], rounded down."""
    red, green, blue = images.float().split(1, 1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()


def _sharpen(images: Tensor, strength: Tensor) -> Tensor:
    """Blend images with blurred images (kernel 1/13, and 5/13 at its center); border pixels do not change."""
    smooth = images.float()
    inner = smooth[..., 1:-1, 1:-1]
    three = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
    nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
    inner.copy_(((nine + 4 * inner) / 13).round())
    return blend(images, smooth, 1 + strength)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # color operations: images, strength [B, 1, 1, 1] -> images
    "brightness": lambda images, strength: blend(images, 0.0, 1 + strength),
    "color": lambda images, strength: blend(images, gray(images), 1 + strength),
    "contrast": lambda images, strength: blend(images, gray(images).mean((1, 2, 3), keepdim=True), 1 + strength),
    "sharpness": _sharpen,
    "posterize": lambda images, strength: images & (256 - 2 ** strength.round()).to(torch.uint8),
    "solarize": lambda images, strength: torch.where(images >= 255 * (1 - strength), 255 - images, images),
    "autocontrast": lambda images, _: TF.autocontrast(images),
    "equalize": lambda images, _: TF.equalize(images),
}
NAMES = [*MOVES, *CHANGES]
