"""A checkpoint file, which is read and verified once.

Loading is safe: it uses the weights, the network's class and plain arguments, the class names, the image size and the
settings of the test. It reads no path, no callback and no config from the file, and runs no code in it. Resuming
(`resuming.py`) reuses the recorded config, which can run code: resume only your own runs.
"""

import contextlib
import hashlib
import json
import math
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn

from cifarnet import __version__, trained
from cifarnet.allowlist import allowed_class
from cifarnet.errors import UserError, reason
from cifarnet.models import construct
from cifarnet.models.construct import limited
from cifarnet.models.tta import TTA
from cifarnet.schema import Pixels, Range, check, check_arguments
from cifarnet.system import files

RUN_FILES = (".hydra/config.yaml", ".lock", "train.log")  # a run writes at least one of them
HUB_WEIGHTS, HUB_SETTINGS = "model.safetensors", "config.json"  # the files of a folder for the Hugging Face Hub


@dataclass(frozen=True)
class Checkpoint:
    """The verified content of a checkpoint.

    Attributes:
        path: the checkpoint file, or the folder in Hugging Face's format.
        version: the version of cifarnet that wrote it.
        epoch: the number of completed epochs.
        step: the number of optimizer steps.
        weights: the network's weights by name.
        model: the network's plain arguments, with its class as `_target_`.
        class_names: the names of the classes in the order of the logits.
        image_size: the height and width of the training images in pixels.
        tta, tta_share, precision, channels_last: the settings of the run that also apply to its test.
        data: the class of the run's data set as `_target_`, and its numeric arguments; never a path.
        content: everything that Lightning saved, for resuming; empty for a folder in Hugging Face's format.
    """

    path: Path
    version: str
    epoch: int
    step: int
    weights: dict[str, Tensor]
    model: dict[str, Any]
    class_names: list[str]
    image_size: Pixels
    tta: TTA
    tta_share: Annotated[float, Range(0, 1)]
    precision: str
    channels_last: bool
    data: dict[str, Any]
    content: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, last: bool = False) -> "Checkpoint":
        """Read a checkpoint and verify its content.

        Args:
            path: a run's folder (its best checkpoint, or the last one if nothing was validated), a checkpoint file, a
                folder in Hugging Face's format, or the name of a trained network of this package. An existing path
                takes precedence over a name.
            last: use the last checkpoint of a run's folder, as resuming does.

        Raises:
            UserError: the checkpoint does not exist, cannot be read, or was written by a newer version of cifarnet.
        """
        path = checkpoint_path(path, last)
        if not path.is_dir() and not path.is_file():  # a pipe would never end
            raise _missing(path)
        try:
            checkpoint = cls._open_hub_folder(path) if path.is_dir() else cls._open_file(path)
            if Version(checkpoint.version) > Version(__version__):
                found = f"cifarnet {checkpoint.version}, but {__version__} is installed"
                raise UserError(f"{path} was written by {found}: update cifarnet.")
            return checkpoint
        except UserError:
            raise
        except Exception as error:  # a damaged file raises exceptions of any type
            found = reason(error).partition(". ")[0]
            found = f"the entry {found} is missing" if isinstance(error, KeyError) else found
            raise UserError(
                f"{path} is not a readable cifarnet checkpoint: {found[:200]}. Use another checkpoint, or train again."
            ) from error

    @classmethod
    def _open_file(cls, path: Path) -> "Checkpoint":
        content = files.read_tensors(path)
        return cls._verified(path, content["hyper_parameters"], content["state_dict"], content)

    @classmethod
    def _open_hub_folder(cls, folder: Path) -> "Checkpoint":
        settings = files.read(folder / HUB_SETTINGS, json.loads, ". Use another checkpoint")
        return cls._verified(folder, settings, load_file(folder / HUB_WEIGHTS), {})

    @classmethod
    def _verified(
        cls, path: Path, settings: Mapping[str, Any], weights: dict[str, Tensor], content: dict[str, Any]
    ) -> "Checkpoint":
        """Check the types of the settings that loading uses, and that the file contains all values of every weight."""
        _check_nesting(settings, iter(range(10**5)))
        prefix = "network."
        weights = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        for name, value in weights.items():
            has_values = value.device.type == "cpu" and value.untyped_storage().nbytes() >= value.nbytes
            if not has_values:  # otherwise a small file could claim weights of any size
                raise ValueError(f"the weight {name} has fewer values than its shape {list(value.shape)} says")
        data = dict(settings.get("data") or {})
        checkpoint = cls(
            path=path,
            version=str(settings["cifarnet"]),
            epoch=content["epoch"] + 1 if content else settings["epoch"],
            step=content.get("global_step", 0),
            weights=weights,
            model=dict(settings["model"]),
            class_names=list(settings["class_names"]),
            image_size=settings["image_size"],
            tta=settings["tta"],
            tta_share=settings.get("tta_share", 1.0),
            precision=settings["precision"],
            channels_last=settings.get("channels_last", True),
            data={key: value for key, value in data.items() if key == "_target_" or isinstance(value, int | float)},
            content=content,
        )
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            check(f"{path}: {name}", getattr(checkpoint, name), hint)
        return checkpoint

    def network(self, classes: Sequence[Any] = ()) -> nn.Module:
        """Build the network with its trained weights, in eval mode on the CPU.

        Args:
            classes: allowed network classes (or functions that return a network) from outside this project.

        Raises:
            UserError: the class is not allowed, or the weights do not fit the network.
        """
        make, arguments = self.architecture(classes)
        build = partial(construct, make, len(self.class_names), self.image_size, **arguments)
        try:
            # allocates no memory; some networks of other libraries cannot be built on the meta device
            with contextlib.suppress(NotImplementedError), limited(self.weights), torch.device("meta"):
                self.check_weights(build())
            with limited(self.weights):
                network = build()
        except (TypeError, ValueError, RuntimeError) as error:
            problem = f"{self.path}: the network cannot be built: {reason(error)}."
            raise UserError(f"{problem} Use the library versions that trained it.") from error
        self.check_weights(network)
        network.load_state_dict(self.weights)
        return network.eval()

    def architecture(self, classes: Sequence[Any] = ()) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
        """Return the class of the network and its arguments, which are plain data.

        Args:
            classes: as for `network`.

        Raises:
            UserError: the class is not allowed, or an argument cannot be used.
        """
        make = allowed_class(self.model.get("_target_"), "cifarnet.models", self.path, classes)
        arguments = {key: value for key, value in self.model.items() if not key.startswith("_")}
        arguments |= {"checkpoint": None} if "checkpoint" in arguments else {}  # it was needed only to start training
        is_ours = make.__module__.startswith("cifarnet.")
        for key, value in arguments.items():
            if not _is_plain(value, 10**6 if is_ours else math.inf):
                raise UserError(f"{self.path}: model.{key}={value} is not plain data. Use another checkpoint.")
        check_arguments(f"{self.path}: model", make, arguments)
        return make, arguments

    def check_weights(self, network: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        """Check that weights fit a network; None checks the weights of this checkpoint.

        Raises:
            UserError: the names or shapes differ.
        """
        expected = {name: value.shape for name, value in network.state_dict().items()}
        found = {name: value.shape for name, value in (weights or self.weights).items()}
        wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
        if wrong:
            problem = f"The weights in {self.path} do not fit the network: {len(wrong)} differ, such as {wrong[0]}"
            raise UserError(f"{problem}. Use the network, the settings and the version that trained them.")

    def check_task(self, class_names: Sequence[str], image_size: int, name: str = "the network") -> None:
        """Check that the data has the classes and the image size that the network was trained on.

        Raises:
            UserError: they differ.
        """
        if not self.has_classes(class_names):
            found, expected = (", ".join(names) for names in (class_names, self.class_names))
            problem = f"The data has the classes {found}; {name} was trained on {expected}"
            raise UserError(f"{problem}. Use data with these classes, in folders with these names.")
        self.check_image_size(image_size, name)

    def has_classes(self, class_names: Sequence[str]) -> bool:
        """Whether the network was trained on these classes, in this order, in any Unicode form of their names."""
        forms = [[unicodedata.normalize("NFC", name) for name in names] for names in (class_names, self.class_names)]
        return forms[0] == forms[1]

    def check_image_size(self, image_size: int, name: str = "the network") -> None:
        """Check that images have the size that the network was trained on.

        Raises:
            UserError: the size differs.
        """
        if image_size != self.image_size:
            problem = f"The images are {image_size} pixels wide; {name} was trained on images of {self.image_size}"
            raise UserError(f"{problem} pixels. Set data.image_size={self.image_size} (data=folder, data=torchvision).")

    def check_images(self, hparams: Mapping[str, Any]) -> None:
        """Check that a run, described by its hyperparameters, uses the images that this checkpoint was trained on.

        Raises:
            UserError: they differ.
        """
        recorded = self.content["hyper_parameters"]
        for name in ("class_names", "image_size", "num_images", "files_sha256"):
            before, now = recorded.get(name), hparams[name]
            if not (self.has_classes(now) if name == "class_names" else before == now):
                raise UserError(
                    f"{self.path} was trained on other images: {name} was {before} and is now {now}. Set data.root=…, "
                    "data.keep=… and data.labels=… to the images and files of that run, or start a new run."
                )

    @property
    def network_name(self) -> str:
        """The name of the network's class or function, and its argument `name`, such as "timm resnet18"."""
        return " ".join(filter(None, [str(self.model["_target_"]).rpartition(".")[2], self.model.get("name")]))

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that the checkpoint belongs to; None for a file outside a run.

        A folder is a run if it contains `checkpoints/` and another file that a run writes.
        """
        folder = self.path.parent.parent
        is_of_run = is_run(folder) or (folder / "metrics.json").exists()
        return folder if self.path.parent.name == "checkpoints" and is_of_run else None

    def folder_for(self, name: str) -> Path:
        """Return the folder for a command's output about this checkpoint: in the run's folder, next to the file, or in
        lightning_logs/trained for a trained network of this package.

        Raises:
            UserError: the folder is a link to a place outside the run's folder.
        """
        if self.run_folder is not None:
            folder = self.run_folder / name
            files.refuse_links(self.run_folder, [folder])
            return folder
        if self.path.parent == trained.FOLDER:  # the package may be installed where it cannot be written to
            return Path("lightning_logs", "trained", self.path.name, name)
        path = self.path.resolve()  # the path may be "."
        return path.with_name(f"{path.name if path.is_dir() else path.stem}_{name}")

    def sha256(self) -> str:
        """The checksum of the file that holds the weights."""
        file = self.path / HUB_WEIGHTS if self.path.is_dir() else self.path
        return hashlib.sha256(file.read_bytes()).hexdigest()


def is_run(folder: Path) -> bool:
    """Return whether a folder contains a file that only runs write."""
    return any((folder / name).exists() for name in RUN_FILES)


def refuse_results(folder: Path) -> None:
    """Check that a folder has no results of another run, which a new run would replace.

    Raises:
        UserError: it has.
    """
    if (folder / "metrics.json").exists() or (folder / "checkpoints" / "last.ckpt").exists():
        remedy = f"Choose another folder, remove this one, or resume the run: ckpt_path={folder}"
        raise UserError(f"{folder} contains the results of another run. {remedy}")


def checkpoint_path(path: str | Path, last: bool = False) -> Path:
    """Return the path of a checkpoint: for a run's folder, the best one, or the last one if nothing was validated.

    The path of a file, or of a folder in Hugging Face's format, is returned unchanged. The name of a trained network of
    this package is replaced with its folder."""
    if str(path) in trained.names() and not Path(path).exists():
        return trained.FOLDER / path
    path = Path(path).expanduser()
    if not path.is_dir() or (path / HUB_WEIGHTS).is_file():
        return path
    best, newest = path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"
    return newest if last or (newest.is_file() and not best.is_file()) else best


def _is_plain(value: Any, most: float) -> bool:
    """Return whether a value is safe in a config: Hydra imports `_target_`, and OmegaConf evaluates `${…}`.

    Args:
        most: the largest number; a network of more layers or channels would exhaust the memory.
    """
    if isinstance(value, Mapping):
        return all(not str(key).startswith("_") and _is_plain(member, most) for key, member in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(member, most) for member in value)
    is_number = isinstance(value, bool | int | float) and not abs(value) > most
    return value is None or is_number or (isinstance(value, str) and "${" not in value)


def _check_nesting(value: Any, left: Iterator[int], depth: int = 20) -> None:
    """Check that a nested value is small; a small file can contain the same list many times, or in itself."""
    if depth == 0 or next(left, None) is None:
        raise ValueError("its settings are too many or nested too deeply")
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for member in members:
        _check_nesting(member, left, depth - 1)


def _missing(path: Path) -> UserError:
    """Return the error for a missing checkpoint, which suggests the latest run below that path."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    runs = sorted(folder.glob("*/checkpoints"), key=lambda found: found.stat().st_mtime)
    suggestion = f" Did you mean {runs[-1].parent}?" if runs else ""
    return UserError(
        f"{path}: no checkpoint found.{suggestion} Specify a run's folder, a file in <run>/checkpoints/, or a trained "
        f"network of this package: {', '.join(trained.names())}."
    )
