"""The classes that a checkpoint file may name.

Instantiating any class that a file names would allow an untrusted file to run code. Loading therefore accepts only the
networks and data sets of this project, and the classes that the user lists in the command.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifarnet.config import find_callable
from cifarnet.errors import UserError

PACKAGE = Path(__file__).parent
DATA = ("cifarnet.data.", "cifarnet.recipes.", "torchvision.transforms.")  # building these reads and writes no file
LIBRARIES = {"cifarnet", "hydra_plugins", "lightning", "optuna", "timm", "torch", "torchvision"}
# modules that only build parts of a run; other modules of these libraries also read files and start programs
PARTS = re.compile(
    r"(cifarnet\.(callbacks|classifier|data|models|optim|recipes)|hydra_plugins\.cifarnet|timm\.(layers|loss|models|optim)"
    r"|lightning\.pytorch\.(plugins|strategies)|torch\.(nn|optim)|torchvision\.(models|ops|transforms))(\.[a-z]\w*)*"
    r"|optuna\.(samplers|pruners)\..+|torch\._C\._nn"
)


def locate(names: Sequence[str]) -> list[Any]:
    """Import the classes and functions that the user lists, as in `classes=[module.Class]`.

    Raises:
        UserError: a class or function does not exist.
    """
    return [find_callable("classes", str(name)) for name in names]


def allowed_class(name: Any, package: str, path: Path, classes: Sequence[Any] = ()) -> Any:
    """Return the class that a file names.

    Args:
        name: the value of `_target_` in the file.
        package: the package of this project whose classes are allowed, such as "cifarnet.models".
        path: the file, for the error message.
        classes: other classes and functions that the user allows.

    Raises:
        UserError: the class is not allowed.
    """
    module, _, class_name = str(name).rpartition(".")
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    modules = {f"{package}.{file.stem}" for file in folder.glob("*.py")}
    if module in {package, *modules}:
        found = getattr(importlib.import_module(module), class_name, None)
        if isinstance(found, type) and found.__module__ in modules:
            return found
    # a package may re-export what its modules define: torchvision.models.resnet18 is torchvision.models.resnet.resnet18
    same_name = [allowed for allowed in classes if allowed.__qualname__ == class_name]
    same_module = [allowed for allowed in same_name if f"{allowed.__module__}.".startswith(f"{module}.")]
    for found in same_module or same_name:
        return found
    raise UserError(
        f"{path} names the class {name}, which is not part of {package}. If it is your own class, allow it: "
        "cifarnet.load(path, classes=[YourClass]), or classes=[module.YourClass] on the command line."
    )


def class_path(found: Any) -> str:
    """Return the full name of a class or function."""
    return f"{found.__module__}.{found.__qualname__}"


def refuse_foreign_classes(config: Mapping[str, Any], path: Path, classes: Sequence[str] = ()) -> None:
    """Check that a recorded config, which is about to be reused, names only classes that build parts of a run.

    Args:
        config: the config as nested dictionaries and lists.
        path: the file that contains the config, for the error message.
        classes: full names of other classes that the user allows.

    Raises:
        UserError: the config names another class.
    """
    for key, name in leaves(config):
        section, *names = key.split(".")
        if "_target_" in (section, *names) and name not in classes and not _builds_a_part(name, section):
            raise UserError(f"{path} names the class {name}. If you trust it, allow it: classes=[{name}]")


def _builds_a_part(name: str, section: str) -> bool:
    """Return whether a name is a class of torch or Lightning for a part of a run, or is defined in one of `PARTS`.

    The section `data` may name only data sets, recipes and transforms, which download nothing when they are built.
    """
    if name.partition(".")[0] not in LIBRARIES or "._" in name:
        return False
    import lightning as L
    import torch
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

    place, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(place), last, None)
    except Exception:  # a module may raise any type
        return False
    # where it is defined: `cifarnet.models.cnn.torch.load` is a function of torch
    module = getattr(found, "__module__", None) or ""
    if section == "data":
        return isinstance(found, type) and module.startswith(DATA)
    if isinstance(found, type) and issubclass(found, L.Trainer | L.Callback | Logger | Profiler | torch.nn.Module):
        return True
    return found is torch.tensor or PARTS.fullmatch(module) is not None


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the full key and the value, as text, of each setting in a nested config, except for null values."""
    if isinstance(node, Mapping | list | tuple):
        for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif node is not None:
        yield key, str(node)
