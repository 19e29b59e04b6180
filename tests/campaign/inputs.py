"""Generated bad inputs: (class, command, arguments).

Commands must refuse those of the classes `REFUSED`. They may accept some of the others.
"""

import json
import math
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cifarnet.cli import compose
from conftest import SMALL, picture

Input = tuple[str, str, list[str]]
REFUSED = {"no number", "unknown", "missing", "foreign class", "space", "damaged"}
NO_NUMBERS = ["nan", "inf", "-inf", str(2**70), "text", "[]", "{}", "[1,[2]]"]
NUMBERS = ["-1", "0", "0.5", "-1e30", "1e30", "true", "null", "3000000000", "''"]
TRAIN = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "hydra.run.dir=run"]

FOLDER = [*TRAIN[len(SMALL) :], "trainer=cpu", "data=folder", "data.batch_size=4"]


FINETUNE = ["+experiment=finetune", *(setting for setting in TRAIN if not setting.startswith("model."))]


def loading(checkpoint: str) -> list[tuple[str, list[str]]]:
    """Return the commands that load a checkpoint, with their arguments."""
    return [
        ("evaluate", [checkpoint, "corruptions=false"]),
        ("predict", [checkpoint, "picture.png", "accelerator=cpu", "explain=true"]),
        ("export", [checkpoint, "format=hub", "output=shared", "images=3"]),
        ("train", [*FINETUNE, f"model.checkpoint={checkpoint}"]),
    ]


def resuming(checkpoint: str) -> tuple[str, list[str]]:
    """Return the command that resumes a run from a checkpoint, with its arguments."""
    return "train", [f"ckpt_path={checkpoint}"]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting with its value."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings() -> dict[str, Any]:
    return dict(leaves(OmegaConf.to_container(compose("train", [*SMALL, "output_dir=x"]), resolve=False)))


def numbers() -> Iterator[Input]:
    for key, value in settings().items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "total_steps":
            yield from (("no number", "train", [*TRAIN, f"{key}={wrong}"]) for wrong in NO_NUMBERS)
            large = key in ("trainer.max_epochs", "data.train_size", "data.test_size", "sweep.keep_checkpoints")
            endless = {"3000000000", "-1"} if large else set()
            wrongs = [wrong for wrong in NUMBERS if wrong not in endless]
            yield from (("number", "train", [*TRAIN, f"{key}={wrong}"]) for wrong in wrongs)


def types(random: random.Random) -> Iterator[Input]:
    wrongs = ["3", "-0.5", "text", "[1,2]", "{a: 1}", "null", "true", "''", "${nothing}", "${", "ä$%&"]
    for key in settings():
        if key != "output_dir":
            for wrong in random.sample(wrongs, 2):
                yield "type", "train", [*TRAIN, f"++{key}={wrong}"]


def names(random: random.Random) -> Iterator[Input]:
    for key in settings():
        place = random.randrange(len(key.rpartition(".")[2])) + len(key) - len(key.rpartition(".")[2])
        yield "unknown", "train", [*TRAIN, f"{key[:place]}q{key[place + 1 :]}=1"]
        if not key.startswith("logger."):  # TensorBoard's logger takes any name, and fails when training starts
            yield "unknown", "train", [*TRAIN, f"+{key}x=1"]
    for group in ("data", "model", "optimizer", "scheduler", "trainer", "callbacks", "logger", "objective"):
        yield "unknown", "train", [*TRAIN, f"{group}=nosuch"]
        for target in ("nosuch.Class", "math.pi", "os", "3", "builtins.list", "torch.nn.Linear", "''", "json.nosuch"):
            yield "type", "train", [*TRAIN, f"++{group}._target_={target}"]
    for command, known in {"evaluate": "tta", "compare": "metric", "predict": "tta", "export": "format"}.items():
        yield "unknown", command, ["good", f"{known}x=1", *(["picture.png"] if command == "predict" else [])]
        yield "missing", command, ["nowhere"]
        yield "missing", command, ["good/.hydra"]
    for command, arguments in {"predict": ["good", "picture.png"], "export": ["good"]}.items():
        for key in compose(command, []):
            if key != "data":
                wrongs = [*NO_NUMBERS, *NUMBERS, "${nothing}", "ä$%&", "../x"]
                yield from (("type", command, [*arguments, f"{key}={wrong}"]) for wrong in random.sample(wrongs, 4))


LIGHTNING = """
    gradient_clip_val=-1 gradient_clip_algorithm=nosuch profiler=nosuch max_time=soon accumulate_grad_batches=0
    check_val_every_n_epoch=0 limit_val_batches=0.0001 limit_val_batches=-1 limit_test_batches=0 limit_test_batches=7.5
    limit_train_batches=2.5 val_check_interval=0 val_check_interval=99 overfit_batches=-1 num_nodes=2 num_nodes=0
    devices=[] devices=0 strategy=nosuch plugins=nosuch max_steps=0 max_steps=-2 min_epochs=5 sync_batchnorm=true
    reload_dataloaders_every_n_epochs=-1 barebones=true fast_dev_run=true fast_dev_run=-1 log_every_n_steps=0
    benchmark=perhaps precision=7 precision=64-true precision=16-true inference_mode=false detect_anomaly=true
"""
SPACES = """
    interval(5,1) tag(log,interval(0,1)) interval(nan,1) interval(0,inf) interval(1) choice() range(0,1,0) range(5)
    range(3,1) glob(*) interval(a,b) tag(log,choice(1,2)) tag(log,interval(-1,1))
"""


def lightnings() -> Iterator[Input]:
    for setting in LIGHTNING.split():
        yield "lightning", "train", [*TRAIN, f"++trainer.{setting}"]
    for monitor in ("val/foo", "''", "3", "null"):
        yield "lightning", "train", [*TRAIN, f"callbacks.best.monitor={monitor}"]


def checkpoints(good: Path, folder: Path, random: random.Random) -> Iterator[Input]:
    """Checkpoints that are damaged, or hold values of other types."""
    whole = (good / "checkpoints/last.ckpt").read_bytes()

    def written(kind: str, name: str, content: bytes) -> Iterator[Input]:
        path = folder / f"{name}.ckpt"
        path.write_bytes(content)
        yield kind, *resuming(path.name)
        yield kind, *random.choice(loading(path.name))

    yield from written("damaged", "empty", b"")
    yield from written("damaged", "text", b"no checkpoint\n" * 99)
    for number in range(6):
        yield from written("damaged", f"short{number}", whole[: random.randrange(len(whole))])
    for number in range(12):
        flipped = bytearray(whole)
        flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        yield from written("file", f"flipped{number}", bytes(flipped))
    content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
    for where, keys in {"": content, "hyper_parameters": content["hyper_parameters"]}.items():
        for key in keys:
            for wrong in random.sample(["missing", None, 3, "text", [], {}, math.nan, [[[]]]], 2):
                altered = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
                part = altered[where] if where else altered
                part[key] = wrong
                if wrong == "missing":
                    del part[key]
                path = folder / f"altered-{where}-{key}-{str(wrong)[:4]}.ckpt"
                torch.save(altered, path)
                yield "file", *random.choice(loading(path.name))


FOREIGN = [  # each would leave a file `exploded` behind if it ran
    {"_target_": "os.mkdir", "path": "exploded"},
    {"_target_": "os.system", "command": "touch exploded"},
    {"_target_": "shutil.copy", "src": "/etc/hostname", "dst": "exploded"},
    {"_target_": "pathlib.Path.touch", "_args_": ["exploded"]},
    {"_target_": "builtins.open", "file": "exploded", "mode": "w"},
    {"_target_": "hydra.utils.get_method", "path": "os.getcwd"},
]
KNOWN = [  # of the packages whose classes a run that is resumed may name
    {"_target_": "torch.utils.collect_env.run", "command": "touch exploded"},
    {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "exploded"},
    {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "${output_dir}/../exploded"},
    {"_target_": "cifarnet.system.files.write", "path": "exploded", "content": ""},
]


def foreign_classes(good: Path, folder: Path, random: random.Random) -> Iterator[Input]:
    """Checkpoints and sweeps of others, whose classes must not be built."""
    for number, payload in enumerate([*FOREIGN, *KNOWN]):
        for place in ("model", "model.widths", "data", "config"):
            content = torch.load(good / "checkpoints/last.ckpt", weights_only=True)
            hparams = content["hyper_parameters"]
            if place == "config":  # loading does not use it
                hparams["config"] |= {"callbacks": {"x": payload}, "model": payload, "logger": payload}
            elif place == "model.widths":
                hparams["model"]["widths"] = payload
            else:
                hparams[place] = payload
            path = folder / f"foreign-{place}-{number}.ckpt"
            torch.save(content, path)
            kind = "foreign class" if place.startswith("model") else "file"
            yield from ((kind, *use) for use in loading(path.name))
            if place == "config" and payload in FOREIGN:
                yield "foreign class", *resuming(path.name)
        if payload in FOREIGN:
            record = folder / f"multirun-{number}"
            shutil.copytree(folder / "sweep", record)
            multirun = OmegaConf.load(record / "multirun.yaml")
            multirun.hydra.overrides.task.append("+callbacks.x=" + json.dumps(payload).replace('"', "'"))
            OmegaConf.save(multirun, record / "multirun.yaml")
            yield "foreign class", "train", [f"sweep.resume={record.name}"]


def records(good: Path, folder: Path, random: random.Random) -> Iterator[Input]:
    """Records of a run and of a job of a sweep with other contents."""
    metrics = json.loads((good / "metrics.json").read_text())
    wrongs = [[], {}, None, "text", 1e308, -1, [1, [2]], True]
    texts = ["", "{", "[]", "nan", "{} {}", "[" * 100_000, '{"config": 1' + "0" * 400 + "}", "\0\0"]
    altered = [json.dumps(metrics | {key: random.choice(wrongs)}) for key in metrics]
    altered += [json.dumps({k: v for k, v in metrics.items() if k != key}) for key in metrics]
    altered += [json.dumps(metrics | {"test_accuracy": wrong}) for wrong in (math.nan, math.inf, 10**400)]
    for number, text in enumerate([*texts, *altered]):
        run = folder / f"record-{number}"
        run.mkdir()
        (run / "metrics.json").write_text(text)
        yield "file", "compare", ["good", run.name]
    for number, name in enumerate(["metrics.json", ".hydra/overrides.yaml", "error.txt", "multirun.yaml"]):
        for text in (b"", b"{", b"\xff\xfe", b"- [", b"[[[]]]"):
            sweep = folder / f"sweep-{number}-{texts.index('') + len(text)}-{text[:1].hex()}"
            shutil.copytree(folder / "sweep", sweep)
            (sweep / (name if name == "multirun.yaml" else f"0/{name}")).write_bytes(text)
            yield "file", "train", [f"sweep.resume={sweep.name}"]


def folders(folder: Path, random: random.Random) -> Iterator[Input]:
    """Folders of images with other files in them."""

    def fifo(path: Path) -> None:
        os.mkfifo(path)

    def listening(path: Path) -> None:
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))

    strange = {
        "fifo.jpg": fifo,
        "socket.png": listening,
        "dangling.jpg": lambda path: path.symlink_to("nowhere.jpg"),
        "loop": lambda path: path.symlink_to(".."),
        "folder.jpg": lambda path: path.mkdir(),
        "empty.jpg": lambda path: path.touch(),
        "short.jpg": lambda path: path.write_bytes(path.with_name("0.jpg").read_bytes()[:300]),
        "text.png": lambda path: path.write_text("no image"),
        "._0.png": lambda path: path.write_text("a resource fork of macOS"),
        ".DS_Store": lambda path: path.touch(),
        "$HOME ${x} {a} %d\n.jpg": lambda path: shutil.copy(path.with_name("0.jpg"), path),
        "device.jpg": lambda path: path.symlink_to("/dev/zero"),
        "huge.png": lambda path: picture(path, size=(20_000, 20_000)),
    }
    for number, (name, make) in enumerate(strange.items()):
        root = folder / f"tree{number}"
        for split in ("train", "test"):
            for kind in ("a", "b"):
                for image in range(6):
                    picture(root / split / kind / f"{image}.jpg", (image, 9, 9))
        make(root / "train/a" / name)
        yield (
            "folder",
            "train",
            [*FOLDER, f"data.root={root.name}"],
        )
    for number, damage in enumerate(["train", "test", "train/a", "train/b", "test/a"]):
        root = folder / f"lacking{number}"
        shutil.copytree(folder / "tree9", root)
        shutil.rmtree(root / damage)
        (root / damage).touch()
        yield (
            "folder",
            "train",
            [*FOLDER, f"data.root={root.name}"],
        )
    for root in ("nowhere", "tree0/train/a/0.jpg", "''", "tree0/train/a", "/proc/1", "tree9/.."):
        yield "folder", "train", [*FOLDER, f"data.root={root}"]


def spaces() -> Iterator[Input]:
    for space in SPACES.split():
        yield "search", "search", [*TRAIN[:-1], f"optimizer.lr={space}", "hydra.sweeper.trials=1"]
    for key in ("optimizer.nosuch", "nosuch", "+nosuch"):
        yield "space", "search", [*TRAIN[:-1], f"{key}=0.1,0.2", "hydra.sweeper.trials=1"]
    for trials in ("0", "1.5", "-1", "true", "text", "null", "nan"):
        yield "space", "search", [*TRAIN[:-1], "model.hidden=8,16", f"hydra.sweeper.trials={trials}"]
    for sweep in ("seed=range(0)", "seed=range(3,1)", "optimizer.lr=choice()", "nosuch=1,2"):
        yield "space", "train", ["-m", *TRAIN[:-1], sweep]


def all_inputs(good: Path, folder: Path, seed: int) -> Iterator[Input]:
    """Yield all inputs.

    Args:
        good: a finished run.
        folder: the folder of the run and of a finished sweep, `sweep`; files are written here.
    """
    draw = random.Random(seed)
    picture(folder / "picture.png")
    yield from numbers()
    yield from types(draw)
    yield from names(draw)
    yield from lightnings()
    yield from checkpoints(good, folder, draw)
    yield from foreign_classes(good, folder, draw)
    yield from records(good, folder, draw)
    yield from folders(folder, draw)
    yield from spaces()
