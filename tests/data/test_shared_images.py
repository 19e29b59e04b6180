import pytest

from cifarnet.build import make_data
from cifarnet.data.shared_images import SharedImages
from conftest import small


def shared(images: SharedImages, *overrides: str):
    """Return a data module that shares the images of the previous one, and whether it does so."""
    config = small("output_dir=run", *overrides)
    data = make_data(config)
    images.share(config.data, data)
    return data, data.preloaded is not None


@pytest.mark.parametrize(
    "override",
    [
        "data.batch_size=10",
        "data.flip=none",
        "seed=3",
        "data.train_sizes=[24]",
        "+recipe=mixup",
        "data.cutout=4",
        "data.sampler=balanced",
    ],
)
def test_runs_that_batch_the_same_images_differently_share_them(override):
    images = SharedImages()
    first, is_shared = shared(images)
    assert not is_shared
    second, is_shared = shared(images, override)
    assert is_shared
    assert second.source.train.images is first.source.train.images


@pytest.mark.parametrize(
    "override",
    [
        "data.train_size=100",
        "data.val_fraction=0.2",
        "data.split_seed=1",
        "data.train_share=0.5",
        "data.label_noise=0.1",
        "data.folds=4 data.fold=1",
        "data.keep=keep.txt",
        "data.labels=labels.txt",
    ],
)
def test_other_images_are_read_anew(override, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("keep.txt", "labels.txt"):
        (tmp_path / name).write_text("1\n" * 200)
    images = SharedImages()
    first, _ = shared(images)
    second, is_shared = shared(images, *override.split())
    assert not is_shared
    assert second.source is not first.source
    assert shared(images, *override.split())[1]  # the next one has those of the second
