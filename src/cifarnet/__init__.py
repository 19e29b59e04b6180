"""cifarnet: train, sweep, evaluate and ship image classifiers for CIFAR-10."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifarnet.inference.trained import load

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imported on first use: torch takes seconds to import, and `--help` does not need it
        from cifarnet.inference.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
