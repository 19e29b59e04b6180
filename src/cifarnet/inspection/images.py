"""A picture of augmented training images with their labels."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from cifarnet.build import Built
from cifarnet.data.loader import Batch
from cifarnet.inference.figures import grid


def draw_images(built: Built) -> Figure:
    """Draw the first training images of the first and of the last epoch, with their labels."""
    pictures, loader = [], built.data.train_dataloader()
    for epoch in (epochs := sorted({1, max(1, built.trainer.max_epochs or 1)})):
        loader.set_epoch(epoch - 1)
        batch = next(iter(loader))
        pictures += zip(batch.images[:24].cpu(), labels(batch, built.data.class_names), strict=False)
    images, captions = zip(*pictures, strict=True)
    title = f"Augmented training images of epoch {' and epoch '.join(map(str, epochs))}"
    return grid(images, [(caption, "black") for caption in captions], title, columns=8)


def labels(batch: Batch, class_names: Sequence[str]) -> list[str]:
    """Return the label of each image of a batch; for mixed images, both labels with their weights."""
    names = [str(class_names[label]) for label in batch.labels.tolist()]
    if batch.partners is None or batch.lam is None:
        return names
    rows = zip(names, batch.partners.tolist(), batch.lam.tolist(), strict=True)
    return [f"{lam:.0%} {name}\n{1 - lam:.0%} {class_names[partner]}" for name, partner, lam in rows]
