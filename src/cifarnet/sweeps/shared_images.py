"""Images that the jobs of a sweep read once."""

import functools
import inspect
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:  # takes seconds to import
    from cifarnet.data.datamodule import ImageDataModule, Source


class ReadBefore:
    """What a job has read, for the next one in its process."""

    def __init__(self) -> None:
        self.asked: Any = None  # for them, in the config
        self.source: Source | None = None

    def give(self, section: DictConfig, data: "ImageDataModule") -> None:
        """Let a data module, made by this section of a config, have the images, if those were asked for alike."""
        from cifarnet.data.datamodule import ImageDataModule

        serving = set(inspect.signature(ImageDataModule).parameters) - {"val_fraction", "split_seed"}
        asked = {key: value for key, value in OmegaConf.to_object(section).items() if key not in serving}
        if asked == self.asked:
            data.given = self.source
        else:
            self.asked = self.source = None  # before others are read, for they take memory
            self.source, self.asked = data.source, asked


@functools.cache
def read_before() -> ReadBefore:
    """Of this process, and its present sweep."""
    return ReadBefore()
