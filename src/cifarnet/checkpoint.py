"""From a checkpoint back to a network, or to the settings of a run that goes on."""

import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from packaging.version import Version
from torch import nn

from cifarnet import __version__
from cifarnet.allowlist import class_path, locate, permitted
from cifarnet.errors import NoImages, UserError
from cifarnet.models import construct, try_on

if TYPE_CHECKING:
    from cifarnet.data import ImageDataModule

REMEDIES = {
    ("data", "root"): " There is no such folder here: say where the images lie, data.root=…",
    ("model", "checkpoint"): " Give it in the command: model.checkpoint=…",
    ("module", "checkpoint"): " A teacher has to lie where it did when the run began: put it there.",
}
SHARED = "model.safetensors", "config.json"  # the files of a folder on Hugging Face's hub
FOLDERS = {"dirpath", "save_dir", "root_dir", "default_root_dir"}  # in which callbacks and loggers write


def find(path: str | Path) -> Path:
    """A run's folder stands for its best checkpoint, or the last one where nothing was validated; a file, and a folder
    that export made to be shared, for itself."""
    path = Path(path)
    if not path.is_dir() or (path / SHARED[0]).is_file():
        return path
    best, last = path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"
    return last if last.is_file() and not best.is_file() else best


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; a file that holds anything but plain data is refused.

    Of a folder that export made to be shared, as much as is in it: nothing of its data, its training and its recipe.

    Returns:
        What Lightning saved. Its "hyper_parameters" are {"cifarnet": version, "class_names": […], "image_size": pixels,
        "images": how many were trained on, "precision": of the arithmetic, "config": the run's, as written};
        "resolved" is that config with `${…}` replaced, but for what asks for more than another setting.

    Raises:
        UserError: there is no such file, it is not a checkpoint of this project, or one of a newer version.
    """
    path = Path(path)
    if path.is_dir():
        return _read_shared(path)
    if not path.is_file():
        runs = _runs_near(path)
        meant = f" Did you mean {runs[0]}?" if runs else ""
        raise UserError(
            f"There is no checkpoint {path}.{meant} A run keeps its own in <run>/checkpoints/, best.ckpt and last.ckpt."
        )
    if path.suffix in (".onnx", ".pt2"):
        raise UserError(f"{path} was exported, for other programs to run. Name the run, or its checkpoint, instead.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksums that torch.save wrote
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        hparams = checkpoint["hyper_parameters"]
        written_by = Version(hparams["cifarnet"])
        checkpoint["resolved"] = resolved = _resolved(hparams["config"])
        checkpoint["state_dict"].items(), *(resolved[section].items() for section in ("data", "model", "module"))
        (
            checkpoint["epoch"] + checkpoint["global_step"],
            list(hparams["class_names"]),
            hparams["precision"],
            int(hparams["image_size"]),
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of cifarnet, or is damaged: it holds other things than plain data. Such "
            "could run code: nothing of it was loaded."
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error
    _check_version(path, written_by)
    return checkpoint


def _read_shared(folder: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{folder} needs safetensors: pip install 'cifarnet[export]'") from error
    try:
        settings = json.loads((folder / SHARED[1]).read_text("utf-8"))
        written_by = Version(settings["cifarnet"])
        told = {key: settings[key] for key in ("cifarnet", "class_names", "image_size", "precision")}
        told["config"] = {"model": settings["model"]}
        list(told["class_names"]), int(told["image_size"]), settings["model"].items(), settings["epoch"] + 1
        resolved = {"data": {}, "model": settings["model"], "module": {"tta": settings["tta"]}}
        content = {"hyper_parameters": told, "resolved": resolved, "state_dict": load_file(folder / SHARED[0])}
    except Exception as error:
        raise _damaged(folder, error) from error
    _check_version(folder, written_by)
    return content | {"epoch": settings["epoch"] - 1, "global_step": 0}


def _runs_near(path: Path) -> list[Path]:
    """Of a checkpoint that is not there: the run around it, or the runs below the folder that was taken for one, the
    latest first."""
    asked = path.parent.parent if path.parent.name == "checkpoints" else path
    around = [folder for folder in [asked, *asked.parents[:3]] if any(folder.glob("checkpoints/*.ckpt"))]
    below = {file.parents[1]: file.stat().st_mtime for file in asked.glob("*/checkpoints/*.ckpt")}
    return around[:1] or sorted(below, key=below.get, reverse=True)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0].partition(". ")[0] or "nothing in it"
    return UserError(f"{path} is not a checkpoint of cifarnet, or is damaged ({type(error).__name__}: {reason}).")


def _check_version(path: Path, written_by: Version) -> None:
    if written_by > Version(__version__):
        raise UserError(
            f"{path} was written by cifarnet {written_by}, newer than the {__version__} installed here: update it."
        )


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """`${seed}` becomes the seed; `${oc.env:HOME}`, which asks for more than another setting, stays as it is."""

    def escaped(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: escaped(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [escaped(value) for value in node]
        asks = isinstance(node, str) and re.search(r"\$\{[^}]*[:$]", node)
        return node.replace("$", "\\$") if asks else node

    return OmegaConf.to_container(OmegaConf.create(escaped(dict(config))), resolve=True)


def refused(name: Any, path: str | Path) -> UserError:
    """That a checkpoint asks for a class that it may not name."""
    return UserError(
        f"{path} asks for {name}, which is no class that this project lists or keeps in its own folders. If it is your "
        "own, allow it: cifarnet.load(path, classes=[YourNetwork]), or on the command line classes=[module.YourClass]."
    )


def checked(config: Mapping[str, Any], path: str | Path, classes: Sequence[Any] = ()) -> dict[str, Any]:
    """A recorded config that names only what it may, with the names of the classes that the user allows in full.

    Raises:
        UserError: it names another class, has a `${…}` that is more than another setting, or a folder outside its own.
    """

    def check(section: str, key: str, node: Any) -> Any:
        if isinstance(node, dict) and "_args_" not in node:
            return {
                name if isinstance(name, int) else str(name): check(section, str(name), value)
                for name, value in node.items()
            }
        if isinstance(node, list | tuple):  # OmegaConf takes both for lists
            return [check(section, "", value) for value in node]
        if key == "_target_":
            found = permitted(node, section, classes)
            if found is None:
                raise refused(node, path)
            return class_path(found) if found in classes else node
        computed = "${" in re.sub(r"\$\{[A-Za-z_][\w.]*\}", "", str(node))  # more than another setting
        plain = node is None or isinstance(node, bool | int | float | str)
        if computed or not plain or _outside(section, key, node):
            remedy = REMEDIES.get((section, key), "")
            raise UserError(f"{path}: {section} asks the machine for {key}={node}, which no checkpoint may.{remedy}")
        return node

    return {str(section): check(str(section), str(section), node) for section, node in config.items()}


def _outside(section: str, key: str, node: Any) -> bool:
    """Is it a place that is not in the run's own folder? Images are read from where they lie, if they do lie there."""
    if key == "output_dir" or section == "start" or not isinstance(node, str):  # whence weights came is not read again
        return False
    if key in FOLDERS:
        return not re.fullmatch(r"\$\{output_dir\}(/[\w-]+)*", node)
    if section == "data":
        return key == "root" and not Path(node).expanduser().is_dir()
    if (section, key) == ("module", "checkpoint"):
        # A teacher lies where the user once said, anywhere on this machine, and is read as every checkpoint is: plain
        # data, classes that may be named. So a stranger's file can have a checkpoint of this project read, and no more;
        # another machine (\\host\share, to which Windows would log in) is not asked.
        return bool(re.match(r"[/\\]{2}", node)) or not os.path.exists(os.path.expanduser(node))
    return node.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", node) or node[1:2] == ":"


def network(content: Mapping[str, Any], path: str | Path, classes: Sequence[Any] = ()) -> tuple[nn.Module, list[str]]:
    """The trained network of what `read` returned, and the names of its classes, as `cifarnet.load` does.

    `path` is for messages.
    """
    hparams = content["hyper_parameters"]
    names = [str(name) for name in hparams["class_names"]]
    built = untrained(content["resolved"]["model"], len(names), hparams["image_size"], path, classes)
    with _telling_damage(path):
        built.load_state_dict(weights(content))
    return built.eval(), names


def weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The network's own, by their names in it, of what `read` returned."""
    prefix = "network."
    return {key[len(prefix) :]: value for key, value in content["state_dict"].items() if key.startswith(prefix)}


def untrained(
    model: Mapping[str, Any], num_classes: int, image_size: int, path: str | Path, classes: Sequence[Any] = ()
) -> nn.Module:
    """The network that the settings of a file describe, if the class they name is one that they may."""
    make = permitted(model.get("_target_"), "model", classes)
    if make is None:
        raise refused(f"the class {model.get('_target_')}", path)
    settings = {key: value for key, value in model.items() if not key.startswith("_")}
    with _telling_damage(path):
        return construct(make, num_classes, image_size, **settings)


@contextlib.contextmanager
def _telling_damage(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged, or its network has changed since: {reason[:300]}") from error


def check_data(
    content: Mapping[str, Any], path: str | Path, classes: Sequence[Any] = (), given: Collection[str] = ()
) -> dict[str, Any]:
    """The settings of the run's data, as names and values, but for those that are given anew.

    Raises:
        UserError: they ask for a class that a checkpoint may not name, or for more than values.
    """
    data = {key: value for key, value in content["resolved"]["data"].items() if key not in ("url", "mix", "transforms")}
    name = data.get("_target_")
    found = permitted(name, "data", classes)
    if found is None:
        raise refused(f"the class {name}", path)
    for key, value in data.items():
        members = value if isinstance(value, list) else [value]
        plain = all(member is None or isinstance(member, bool | int | float | str) for member in members)
        known = key == "_target_" or (key.isidentifier() and not key.startswith("_") and key != "defaults")
        if key in given:
            data[key] = None
        elif _outside("data", key, value):
            raise NoImages(f"{path}: its images lay in {value}, which is no folder here. Say where: data.{key}=…")
        elif not (plain and known) or "${" in str(value):
            raise UserError(
                f"{path}: its setting data.{key}={value} is no plain value, and is not used. "
                "Say what to test on: data=cifar10, or data=folder data.root=…"
            )
    return data | {"_target_": class_path(found)}


def check_same_task(
    hparams: Mapping[str, Any], class_names: Sequence[str], image_size: int, network: str = "the network"
) -> None:
    """Refuse images of other classes, or of another size, than the network was trained on."""
    if list(class_names) != list(hparams["class_names"]):
        raise UserError(
            f"The data has the classes {', '.join(class_names)}; {network} knows "
            f"{', '.join(hparams['class_names'])}. Give data of these classes, in folders of these names."
        )
    check_same_size(hparams, image_size, network)


def check_same_size(hparams: Mapping[str, Any], image_size: int, network: str) -> None:
    """Refuse images of another size than the network was trained on."""
    if image_size != hparams["image_size"]:
        raise UserError(
            f"The images are {image_size} pixels wide; {network} was trained on {hparams['image_size']}. "
            f"For a folder: data.image_size={hparams['image_size']}"
        )


def load_for(data: "ImageDataModule", path: str | Path, classes: Sequence[str] = ()) -> nn.Module:
    """The trained network of a checkpoint, as `cifarnet.load` gives it, that is to teach another what these images are.

    Args:
        classes: names of those from outside this project that it may ask for.

    Raises:
        UserError: as of `cifarnet.load`; or it was trained on other classes, in another order, or on images of another
            size.
    """
    path = find(os.path.expanduser(path))
    content = read(path)
    teacher = f"the teacher {path}"
    check_same_task(content["hyper_parameters"], data.class_names, data.image_size, teacher)
    made, names = network(content, path, locate(classes))
    try_on(made, data.train_sizes or [], len(names), teacher)
    return made.to(memory_format=torch.channels_last)  # as batches are
