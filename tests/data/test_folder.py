import errno
import os
import pickle
import shutil
import socket
import subprocess
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cifarnet.data import ImageFolder, pixels
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


def test_validation_images_in_val_are_used(tree):
    picture(tree / "val" / "dog" / "one.png")
    data = read(tree)
    assert data.source.train.labels.bincount().tolist() == [20, 10]
    assert data.source.val.labels.tolist() == [1]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "JPEG", "gif", "tif"])
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


def test_the_cache_is_used_and_renewed(tree, cache, monkeypatch):
    decoded = []
    original = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda path, *rest: decoded.append(path) or original(path, *rest))

    first = read(tree)
    assert len(decoded) == 38
    assert len(list(cache.iterdir())) == 2  # of train/ and test/
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
    assert len(list(cache.iterdir())) == 2  # replaced, not added

    assert read(tree, image_size=8).image_size == 8
    assert len(list(cache.iterdir())) == 4  # for both sizes


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def flip_a_bit(cache):
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)


def alter(**parts):
    return lambda cache: torch.save(torch.load(cache) | parts, cache)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda cache: cache.write_bytes(b"damaged"),
        lambda cache: cache.write_bytes(cache.read_bytes()[:-100]),
        lambda cache: cache.write_bytes(pickle.dumps(Bomb())),
        lambda cache: torch.save(Bomb(), cache),
        lambda cache: torch.save({}, cache),
        alter(images=torch.zeros(30, 3, 16, 16, dtype=torch.uint8)),
        alter(images=torch.zeros(30, 3, 32, 32)),
        alter(images=None),
        alter(fingerprint="another"),
    ],
    ids=["bit", "text", "short", "pickle", "bomb", "empty", "shape", "type", "none", "other"],
)
def test_a_damaged_cache_is_renewed(tree, cache, damage, monkeypatch):
    monkeypatch.chdir(cache.parent)
    images = read(tree).source.train.images
    file = max(cache.iterdir(), key=os.path.getsize)  # of train/
    whole = torch.load(file)
    damage(file)
    assert torch.equal(read(tree).source.train.images, images)
    again = torch.load(file)
    assert again["fingerprint"] == whole["fingerprint"]
    assert torch.equal(again["images"], whole["images"])
    assert not (cache.parent / "exploded").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_cache_that_cannot_be_written_leaves_nothing(tree, cache, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(error))
        if isinstance(error, OSError):
            assert len(read(tree).source.test) == 8
            assert f"cannot be cached in {cache}: [Errno 28] No space left" in capsys.readouterr().err
        else:
            with pytest.raises(KeyboardInterrupt):
                read(tree)
    assert list(cache.iterdir()) == []
    read(tree)
    files = set(cache.iterdir())
    for file in files:
        (cache / f".{file.name}.7.tmp").touch()  # of a process that was killed
        file.unlink()
    read(tree)
    assert set(cache.iterdir()) == files


def test_a_cache_on_a_full_disk(tree, cache, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", cache], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        assert len(read(tree).source.test) == 8
        assert list(cache.iterdir()) == []
    finally:
        subprocess.run(["umount", cache], check=True)
    assert "No space left on device" in capsys.readouterr().err


def ramp(white, dtype):
    """20,000 / 65,535 of white everywhere except in a black and a white corner."""
    values = np.full((32, 32), 20_000 / 65_535 * white).astype(dtype)
    values[0, 0], values[-1, -1] = 0, white
    return values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grey.png", ramp(65_535, np.uint16)),
        ("grey.tif", ramp(65_535, np.uint16)),
        ("big_endian.tif", ramp(65_535, ">u2")),
        ("grey32.tif", ramp(65_535, np.int32)),
        ("shares.tif", ramp(1, np.float32)),
        ("grey.pgm", ramp(65_535, np.uint16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_grey_of_more_than_8_bits_is_scaled(tree, name, values):
    Image.fromarray(values).save(tree / "test" / "cat" / f"_{name}")
    image = read(tree).source.test.images[4]  # after 0.png to 3.png
    assert image[:, 5, 5].tolist() == [78] * 3
    assert image[:, 0, 0].tolist() == [0] * 3
    assert image[:, -1, -1].tolist() == [255] * 3


def test_values_above_white_are_refused(tree):
    Image.fromarray(np.full((32, 32), 300, np.float32)).save(tree / "test" / "cat" / "float.tif")
    with pytest.raises(UserError, match=r"float.tif cannot be read.*from 300 to 300, not from 0 to 1\)"):
        read(tree)


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "palette", "rotated", "animated"])
def test_images_of_every_kind(tree, kind):
    """A picture whose left half is white."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    image, ending, settings = Image.fromarray(pixels), ".png", {}
    if kind == "palette":
        image = image.quantize(2)  # two colors, of which white is half transparent
        settings["transparency"] = bytes([255, 128] if image.getpixel((31, 0)) == 0 else [128, 255])
    elif kind == "rotated":
        settings["exif"] = Image.Exif()
        settings["exif"][274] = 6  # rotate clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif kind == "animated":
        ending, settings = ".gif", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))]}
    else:
        image, ending = image.convert(kind), ".tif" if kind in ("CMYK", "YCbCr") else ".png"
        settings = {"compression": "tiff_lzw"} if kind == "YCbCr" else {}  # Pillow 12 cannot read uncompressed ones
    image.save(tree / "test" / "cat" / f"_{ending}", **settings)
    with warnings.catch_warnings(action="error"):
        image = read(tree).source.test.images[4].int()
    assert (image[:, :, :16] > 250).all()
    assert (image[:, :, 16:] < 5).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tree, mode):
    """Half of the picture is opaque, a quarter half transparent, and a quarter fully transparent."""
    pixels = np.full((32, 32, 4), 100, np.uint8)
    pixels[:, :, 3] = 255
    pixels[:16, :16, 3], pixels[16:, :16] = 128, 0
    Image.fromarray(pixels).convert(mode).save(tree / "test/cat/_.png")
    image = read(tree).source.test.images[4].int()
    assert (image[:, :, 16:] == 100).all()
    if mode != "P":  # a palette has no half transparent pixels
        assert (image[:, :16, :16] == 177).all()
    assert (image[:, 16:, :16] == 255).all()


COMPOSED, DECOMPOSED = "\u00e9lan caf\u00e9", "e\u0301lan cafe\u0301"  # the same name, as on Linux and on a Mac


@pytest.mark.parametrize("train", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("test", [COMPOSED, DECOMPOSED])
def test_class_folders_are_compared_in_any_unicode_form(tree, train, test):
    (tree / "train/cat").rename(tree / "train" / train)
    (tree / "test/cat").rename(tree / "test" / test)
    source = read(tree).source
    assert source.class_names == ["dog", COMPOSED]  # in the same order on all machines
    assert source.train.labels.bincount().tolist() == [9, 18]
    assert source.test.labels.bincount().tolist() == [4, 4]
    assert (source.train.images[source.train.labels == 0][:, 2] == 100).all()  # the dogs


def test_two_folders_of_one_name_are_one_class(tree):
    (tree / "train/cat").rename(tree / "train" / COMPOSED)
    (tree / "test/cat").rename(tree / "test" / DECOMPOSED)
    picture(tree / "train" / DECOMPOSED / "more.png")
    assert read(tree, val_fraction=0).source.train.labels.bincount().tolist() == [10, 21]


def test_class_names_that_differ_only_in_case_are_reported(tree, capsys):
    read(tree)
    assert "case" not in capsys.readouterr().out
    picture(tree / "train/Cat/0.png")
    assert read(tree).class_names == ["Cat", "cat", "dog"]
    assert "train/ has classes whose names differ only in case: Cat, cat.\n" in capsys.readouterr().out
    (tree / "test/dog").rename(tree / "test/Dog")
    with pytest.raises(UserError, match=r"test/Dog is not a class of train/\. Did you mean dog\?"):
        read(tree)


IGNORED = ["Thumbs.db", "ehthumbs.db", "desktop.ini", ".DS_Store", "._0.jpg", ".hidden/x.heic", "Icon\r", "a.txt"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_that_are_left_out_are_reported_in_one_line(tree, capsys, in_memory):
    for name in IGNORED:
        (tree / "train/cat" / name).parent.mkdir(exist_ok=True)
        (tree / "train/cat" / name).touch()
    read(tree, in_memory=in_memory)
    assert "left out" not in capsys.readouterr().out
    for name in ["train/cat/a.heic", "train/cat/below/b.HEIC", "test/dog/c", "val/dog/d.jpg_large", "train/e.jpg"]:
        (tree / name).parent.mkdir(exist_ok=True, parents=True)
        (tree / name).touch()
    picture(tree / "val/cat/f.png")
    read(tree, in_memory=in_memory)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    endings = "2 .heic, 1 .jpg beside the class folders, 1 without an ending, 1 .jpg_large"
    assert line == f"data.root={tree}: 5 files left out: {endings}."


def test_many_endings_and_line_breaks_fit_on_one_line(tree, capsys):
    for i in range(9):
        (tree / f"train/cat/x.a{i}\n\x1b").touch()
    read(tree)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "9 files left out" in line]
    assert line.endswith(r"1 .a4\n\x1b, ….")


def test_the_reason_why_a_class_is_empty_is_reported(tree, capsys):
    shutil.rmtree(tree / "train/dog")
    (tree / "train/dog").mkdir()
    (tree / "train/dog/0.heic").touch()
    with pytest.raises(UserError, match=r"has no images .* of dog"):
        read(tree)
    assert "1 file left out: 1 .heic." in capsys.readouterr().out


def test_all_unreadable_files_are_reported_at_once(tree, cache):
    content = (tree / "train/cat/00.png").read_bytes()
    broken = ["train/cat/00.png", "train/dog/two\nlines.png", "test/dog/0.png", "test/dog/link.png"]
    (tree / broken[0]).write_bytes(content[:-30])
    (tree / broken[1]).write_bytes(b"")
    (tree / broken[2]).write_bytes(b"no image")
    (tree / broken[3]).symlink_to("nowhere")
    with pytest.raises(UserError) as error:
        read(tree)
    lines = str(error.value).splitlines()
    assert [line.partition(" cannot be read as an image (")[0] for line in lines] == [
        str(tree / name).replace("\n", r"\n") for name in broken
    ]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_removed_while_it_is_streamed_is_named(tree, workers):
    loader = read(tree, in_memory=False, workers=workers).test_dataloader()
    assert len(list(loader)) == 1
    (tree / "test/dog/2.png").unlink()
    with pytest.raises(UserError) as error:
        list(loader)
    problem = f"{tree}/test/dog/2.png cannot be read as an image (No such file or directory)"
    assert str(error.value) == f"{problem}. Replace or remove it."


SPECIAL = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused(tree, kind, monkeypatch):
    monkeypatch.chdir(tree / "train" / "cat")  # the path of a socket must be short
    SPECIAL[kind](Path("x.jpg"))
    with pytest.raises(UserError, match=r"train/cat/x.jpg cannot be read"):
        read(tree)


def test_folders_and_files_beside_images(tree, tmp_path):
    cat = tree / "train" / "cat"
    for name in ("._00.png", ".DS_Store", "Thumbs.db", ".hidden/a.png", "note.txt"):
        (cat / name).parent.mkdir(exist_ok=True)
        (cat / name).write_bytes(b"no image")
    (cat / "again").symlink_to(cat)  # a loop
    picture(cat / "folder.jpg" / "a%{$}\n.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tree / "train" / "cow").symlink_to(tmp_path / "elsewhere")
    os.rename(cat / "01.png", os.fsencode(cat) + b"/\xff.png")
    data = read(tree, val_fraction=0)
    assert data.class_names == ["cat", "cow", "dog"]
    assert data.source.train.labels.bincount().tolist() == [21, 1, 10]


@pytest.mark.parametrize("name", [b"\xff\xfe", b"two\nlines", b"\x1b[31m"])
def test_unprintable_class_names_are_refused(tree, name):
    os.rename(os.fsencode(tree / "train" / "dog"), os.fsencode(tree / "train") + b"/" + name)
    with pytest.raises(UserError, match=r"unprintable characters\. Rename it") as error:
        read(tree)
    assert str(error.value).isprintable()


def test_a_class_without_test_images_is_reported(tree, capsys):
    shutil.rmtree(tree / "test/dog")
    read(tree)
    assert "test/ has no images of dog." in capsys.readouterr().out


def test_an_unreadable_folder_is_named(tree, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(folder_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"train cannot be read \(Permission denied\)"):
        read(tree)


@pytest.mark.parametrize("in_memory", [True, False])
def test_no_other_program_is_started(tree, in_memory, monkeypatch):
    """By default Pillow passes PostScript, whatever the file's name, to Ghostscript."""
    Image.new("RGB", (32, 32)).save(tree / "test" / "cat" / "a.jpg", format="EPS")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=r"a.jpg cannot be read as an image"):
        list(read(tree, in_memory=in_memory, workers=0).test_dataloader())


def test_validation_images_in_val_are_used_with_a_val_fraction_of_0(tree):
    assert not ImageFolder(str(tree), val_fraction=0).validates
    picture(tree / "val" / "dog" / "one.png")
    assert ImageFolder(str(tree), val_fraction=0).validates
    assert len(read(tree, val_fraction=0).source.val) == 1


def test_channel_statistics_are_exact(tree):
    data = read(tree)
    scaled = data.source.train.images.double() / 255
    mean, std = data.source.channel_statistics
    torch.testing.assert_close(mean, scaled.mean((0, 2, 3)))
    torch.testing.assert_close(std, scaled.std((0, 2, 3), correction=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_those_from_memory(tree, cache, workers):
    settings = {"cutout": 9, "flip": "alternating", "mix": Mixup(0.5)}
    kept, streamed = read(tree, **settings), read(tree, in_memory=False, workers=workers, **settings)
    assert len(list(cache.iterdir())) == 2  # streaming writes no cache
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader, streaming = getattr(kept, name)(), getattr(streamed, name)()
        assert len(loader) == len(streaming) > 0
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            streaming.sampler.set_epoch(epoch)
            for batch, same in zip(loader, streaming, strict=True):
                assert (batch.partners is None) == (same.partners is None) == (name != "train_dataloader")
                pairs = [pair for pair in zip(batch, same, strict=True) if pair[0] is not None]
                assert all(torch.equal(*pair) for pair in pairs)
    assert torch.equal(torch.get_rng_state(), state)  # so that dropout does not change
    assert streamed.describe() == kept.describe() | {"sha256": None}
    for one, other in zip(kept.source.channel_statistics, streamed.source.channel_statistics, strict=True):
        assert torch.equal(one, other)


def test_a_broken_image_is_named_while_streaming(tree):
    (tree / "train" / "dog" / "broken.jpg").write_bytes(b"this is no image")
    data = read(tree, in_memory=False, workers=2, val_fraction=0.05)
    with pytest.raises(UserError, match=r"dog.broken.jpg cannot be read"):
        list(data.train_dataloader())


def test_images_that_do_not_fit_in_memory(tree, monkeypatch):
    monkeypatch.setattr(folder_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(UserError, match=r"need [\d,.]+ GiB of memory, .*data.in_memory=false"):
        read(tree, image_size=400)


def test_mistakes_are_named(tree):
    def refused(match, **arguments):
        with pytest.raises(UserError, match=match):
            read(tree, **arguments)

    refused("crop_padding=32 .*Choose data.crop_padding=31 or less", crop_padding=32)
    refused("val_fraction=0.01", val_fraction=0.01)

    (tree / "train" / "cow").mkdir()
    refused(r"train has no images .*of cow")
    (tree / "train" / "cow").rmdir()
    picture(tree / "test" / "bird" / "a.png")
    refused(r"test.bird is not a class of train")
    (tree / "test" / "bird" / "a.png").unlink()
    (tree / "test" / "bird").rmdir()

    broken = tree / "train" / "dog" / "broken.jpg"
    broken.write_bytes(b"this is no image")
    refused(r"dog.broken.jpg cannot be read")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:400])  # truncated
    refused(r"dog.broken.jpg cannot be read")
    broken.unlink()

    (tree / "test").rename(tree / "tset")
    refused(r"test cannot be read \(No such file.*test/<class>")
    with pytest.raises(UserError, match=r"train cannot be read \(No such file"):
        read(tree / "nowhere")


def test_photographs(photographs):
    data = read(photographs)
    assert (len(data.source.train), len(data.source.val), len(data.source.test)) == (45_000, 5_000, 10_000)
    assert data.source.val.labels.bincount().tolist() == [500] * 10
    assert data.class_names[0] == "airplane"
    assert data.class_names[-1] == "truck"
    mean = data.source.train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4912, 0.4821, 0.4465]).double(), rtol=0, atol=2e-3)
