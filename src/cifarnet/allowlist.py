"""What a checkpoint may name: classes that are listed, that lie where only this project puts them, or that the user
names in the command.

Building anything else that a file asks for would let a stranger's file run code.
"""

import importlib
import pydoc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifarnet.errors import UserError

PACKAGE = Path(__file__).parent
CALLBACK, MODULE, OPTIMIZER = "lightning.pytorch.callbacks.Callback", "torch.nn.Module", "torch.optim.Optimizer"
SCHEDULER = "torch.optim.lr_scheduler.LRScheduler"
CALLBACKS = {
    "lightning.pytorch.callbacks": CALLBACK,
    "cifarnet.callbacks": CALLBACK,
    "cifarnet.recipes": "builtins.object",
}
# packages whose classes may stand in a section of a run's config, and what they must be
ROOMS = {
    "model": {"cifarnet.models": MODULE},
    "data": {"cifarnet.data": "lightning.LightningDataModule", "cifarnet.recipes": "builtins.object"},
    "optimizer": {"torch.optim": OPTIMIZER, "cifarnet.optim": OPTIMIZER, "timm.optim": OPTIMIZER},
    "scheduler": {"torch.optim.lr_scheduler": SCHEDULER, "cifarnet.optim": SCHEDULER},
    "objective": {"torch.nn": MODULE, "cifarnet.recipes": "builtins.object"},
    "callbacks": CALLBACKS,
    "recipe": CALLBACKS,
    "logger": {"lightning.pytorch.loggers": "lightning.pytorch.loggers.Logger"},
    "trainer": {"lightning": "lightning.Trainer"},
    "module": {"cifarnet": "lightning.LightningModule", "cifarnet.recipes": "cifarnet.recipes.distillation.Teacher"},
}


def locate(names: Sequence[str]) -> list[Any]:
    """The classes and functions that the user names, as in `classes=[module.Class]`.

    Raises:
        UserError: there is none of that name.
    """
    found = []
    for name in names:
        try:
            found.append(pydoc.locate(str(name)))
        except pydoc.ErrorDuringImport as error:
            raise UserError(f"classes: {name} cannot be imported: {error}") from error
        if not callable(found[-1]):
            raise UserError(f"classes: there is no class {name}. Give it as classes=[module.Class].")
    return found


def permitted(name: Any, room: str, classes: Sequence[Any] = ()) -> Any:
    """The class that a file asks for by this name, or None where it may not.

    Args:
        name: as a config's `_target_` says it.
        room: a section of a run's config, such as "model", which says where its classes lie.
        classes: what the user allows beside them.
    """
    if not isinstance(name, str):
        return None
    place, _, own = name.rpartition(".")
    for package, base in ROOMS.get(room, {}).items():
        if package.partition(".")[0] != place.partition(".")[0]:
            continue
        if package.partition(".")[0] == PACKAGE.name:
            found = _of_this_project(package, place, own)
        else:
            module = _imported(package)
            found = getattr(module, own, None) if own in _offered(module) else None
            if place not in (package, getattr(found, "__module__", None)):
                continue
        if isinstance(found, type) and issubclass(found, pydoc.locate(base)):
            return found
    # packages offer what their modules define: torchvision.models.resnet18 is that of torchvision.models.resnet
    allowed = [cls for cls in classes if cls.__qualname__ == own]
    exact = [cls for cls in allowed if f"{cls.__module__}.".startswith(f"{place}.")]
    return next(iter(exact or allowed), None)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        library = package.partition(".")[0]
        raise UserError(f"{package} needs {library}: pip install 'cifarnet[{library}]' ({error})") from error


def class_path(found: Any) -> str:
    """The full name of a class or function."""
    return f"{found.__module__}.{found.__qualname__}"


def _of_this_project(package: str, place: str, own: str) -> Any:
    """A class defined directly in a file of this package's folder, whether the file or the package offers it."""
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    files = {f"{package}.{path.stem}" for path in folder.glob("*.py")}
    if place not in {package, *files}:
        return None
    found = getattr(importlib.import_module(place), own, None)
    return found if getattr(found, "__module__", None) in files else None


def _offered(module: Any) -> list[str]:
    return list(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]))
