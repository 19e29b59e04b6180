"""Images that the consecutive runs of one process read once."""

import inspect
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifarnet.data.datamodule import ImageDataModule, Source


class SharedImages:
    """Keeps the images of a run for the next one, such as the next job of a sweep, if it reads the same ones."""

    def __init__(self) -> None:
        self.settings: dict[Any, Any] | None = None
        self.source: Source | None = None

    def share(self, section: DictConfig, data: ImageDataModule) -> None:
        """Give a data module the images of the previous run, if its settings are the same; otherwise read its own.

        Args:
            section: the section `data` of the config from which the data module was built.
        """
        batching = set(inspect.signature(ImageDataModule).parameters) - {"val_fraction", "split_seed"}
        written: Any = OmegaConf.to_object(section)
        settings = {key: value for key, value in written.items() if key not in batching}
        if settings == self.settings:
            data.preloaded = self.source
        else:
            self.settings = self.source = None  # free the memory first
            self.source, self.settings = data.source, settings
