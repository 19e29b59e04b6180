"""Images that consecutive runs in one process read only once."""

import inspect
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifarnet.data.datamodule import ImageDataModule, Source


class SharedImages:
    """Keeps the images of a run for the next run, such as the next job of a sweep, if it reads the same images."""

    def __init__(self) -> None:
        self.settings: dict[Any, Any] | None = None
        self.source: Source | None = None

    def share(self, section: DictConfig, data: ImageDataModule) -> None:
        """Pass the images of the previous run to a data module with the same settings; otherwise read its images.

        Args:
            section: the section `data` of the config that describes the data module.
        """
        batching = set(inspect.signature(ImageDataModule).parameters)
        written: Any = OmegaConf.to_object(section)
        settings = {key: value for key, value in written.items() if key not in batching}
        if settings == self.settings:
            data.preloaded = self.source
        else:
            self.settings = self.source = None  # free the memory first
            self.source, self.settings = data.source, settings
