import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cifarnet.data import ImageFolder
from cifarnet.data import folder as folder_module
from cifarnet.errors import UserError
from cifarnet.recipes.mixup import Mixup
from conftest import picture


@pytest.fixture
def tree(tmp_path):
    """Two classes, 20 and 10 training images, 4 test images each."""
    root = tmp_path / "pictures"
    for name, count in [("cat", 20), ("dog", 10)]:
        for i in range(count):
            picture(root / "train" / name / f"{i:02}.png", (i, 0, 100 if name == "dog" else 0))
        for i in range(4):
            picture(root / "test" / name / f"{i}.png", (100 + i, 0, 0))
    return root


def read(root, **arguments):
    data = ImageFolder(str(root), **({"batch_size": 4} | arguments))
    assert data.source
    return data


def test_images_labels_and_a_stratified_split(tree):
    data = read(tree)
    assert data.class_names == ["cat", "dog"]
    assert data.source.train.labels.bincount().tolist() == [18, 9]
    assert data.source.val.labels.bincount().tolist() == [2, 1]
    assert data.source.test.images[:, 0, 5, 5].tolist() == [100, 101, 102, 103] * 2
    assert data.source.test.labels.tolist() == [0] * 4 + [1] * 4
    everything = torch.cat([data.source.train.images, data.source.val.images])
    assert sorted(everything[:, 0, 0, 0].tolist()) == sorted([*range(20), *range(10)])


def test_the_split_depends_on_split_seed_alone(tree):
    one, same, other = read(tree), read(tree, shuffle_seed=7), read(tree, split_seed=1)
    assert torch.equal(one.source.val.images, same.source.val.images)
    assert not torch.equal(one.source.val.images, other.source.val.images)


def test_own_validation_images_are_used(tree):
    picture(tree / "val" / "dog" / "one.png")
    data = read(tree)
    assert data.source.train.labels.bincount().tolist() == [20, 10]
    assert data.source.val.labels.tolist() == [1]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "JPEG"])
def test_formats_and_other_sizes(tree, ending):
    picture(tree / "train" / "cat" / f"big.{ending}", (200, 100, 50), size=(90, 60))
    (tree / "train" / "cat" / "notes.txt").write_text("not an image, and no mistake")
    data = read(tree, image_size=16, val_fraction=0.04)
    images = torch.cat([data.source.train.images, data.source.val.images])
    assert images.shape == (31, 3, 16, 16)
    big = images[images[:, 0, 0, 0] > 150]
    assert len(big) == 1
    assert (big[0].float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 4


def test_grey_and_palette_images_become_rgb(tree):
    picture(tree / "train" / "cat" / "grey.png", (102, 102, 102), mode="L")
    picture(tree / "train" / "cat" / "palette.png", (102, 102, 102), mode="P")
    data = read(tree, image_size=8)
    images = torch.cat([data.source.train.images, data.source.val.images])
    assert int((images == 102).all(dim=(1, 2, 3)).sum()) == 2


def test_cache_is_used_and_renewed(tree, cache, monkeypatch):
    decoded = []
    original = folder_module._decode
    monkeypatch.setattr(folder_module, "_decode", lambda path, size: decoded.append(path) or original(path, size))

    first = read(tree)
    assert len(decoded) == 38
    assert len(list(cache.iterdir())) == 1
    assert not (tree / ".cache").exists()
    second = read(tree)
    assert len(decoded) == 38
    assert torch.equal(first.source.train.images, second.source.train.images)

    picture(tree / "train" / "cat" / "new.png", (250, 0, 0))  # added
    assert len(read(tree).source.train) + len(read(tree).source.val) == 31
    (tree / "train" / "cat" / "new.png").unlink()  # removed
    assert len(read(tree).source.train) + len(read(tree).source.val) == 30
    changed = tree / "test" / "cat" / "0.png"
    picture(changed, (177, 0, 0))
    os.utime(changed, ns=(time.time_ns(), time.time_ns() + 5_000_000_000))
    assert read(tree).source.test.images[0, 0, 0, 0] == 177
    assert len(list(cache.iterdir())) == 1  # replaced, not piled up

    next(cache.iterdir()).write_bytes(b"damaged")
    assert read(tree).source.test.images[0, 0, 0, 0] == 177


def test_channel_statistics_are_exact(tree):
    data = read(tree)
    scaled = data.source.train.images.double() / 255
    mean, std = data.channel_statistics
    torch.testing.assert_close(mean, scaled.mean((0, 2, 3)))
    torch.testing.assert_close(std, scaled.std((0, 2, 3), correction=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_those_from_memory(tree, cache, workers):
    settings = {"cutout": 9, "flip": "alternating", "mix": Mixup(0.5)}
    kept, streamed = read(tree, **settings), read(tree, in_memory=False, workers=workers, **settings)
    assert len(list(cache.iterdir())) == 1  # streaming makes no cache
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        one, other = getattr(kept, name)(), getattr(streamed, name)()
        assert len(one) == len(other) > 0
        for epoch in (0, 1):
            one.sampler.set_epoch(epoch)
            other.sampler.set_epoch(epoch)
            for batch, same in zip(one, other, strict=True):
                assert all(torch.equal(*pair) for pair in zip(batch, same, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # dropout is not disturbed
    assert streamed.describe() == kept.describe() | {"sha256": None}
    for one, other in zip(kept.channel_statistics, streamed.channel_statistics, strict=True):
        assert torch.equal(one, other)


def test_broken_image_is_named_while_streaming(tree):
    (tree / "train" / "dog" / "broken.jpg").write_bytes(b"this is no image")
    data = read(tree, in_memory=False, workers=2, val_fraction=0.05)
    with pytest.raises(UserError, match=r"dog.broken.jpg cannot be read"):
        list(data.train_dataloader())


def test_images_that_do_not_fit_in_memory(tree):
    with pytest.raises(UserError, match=r"need [\d,.]+ GiB of memory, and [\d.]+ GiB are free.*data.in_memory=false"):
        read(tree, image_size=200_000)


def test_mistakes_are_named(tree):
    def refused(match, **arguments):
        with pytest.raises(UserError, match=match):
            read(tree, **arguments)

    refused(r"data.batch_size=28 is larger than an epoch of 27", batch_size=28)
    refused("crop_padding=32", crop_padding=32)
    refused("val_fraction=0.01", val_fraction=0.01)
    refused("val_fraction=1.5", val_fraction=1.5)
    refused("image_size=0", image_size=0)

    (tree / "train" / "cow").mkdir()
    refused(r"train.cow holds no images")
    (tree / "train" / "cow").rmdir()
    picture(tree / "test" / "bird" / "a.png")
    refused(r"test.bird.*not in train")
    (tree / "test" / "bird" / "a.png").unlink()
    (tree / "test" / "bird").rmdir()

    broken = tree / "train" / "dog" / "broken.jpg"
    broken.write_bytes(b"this is no image")
    refused(r"dog.broken.jpg cannot be read")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:400])  # cut short
    refused(r"dog.broken.jpg cannot be read")
    broken.unlink()

    (tree / "test").rename(tree / "tset")
    refused("has no folder test")
    with pytest.raises(UserError, match="has no folder train"):
        read(tree / "nowhere")


def test_photographs(photographs):
    data = read(photographs)
    assert (len(data.source.train), len(data.source.val), len(data.source.test)) == (45_000, 5_000, 10_000)
    assert data.source.val.labels.bincount().tolist() == [500] * 10
    assert data.class_names[0] == "airplane"
    assert data.class_names[-1] == "truck"
    mean = data.source.train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4912, 0.4821, 0.4465]).double(), rtol=0, atol=2e-3)
