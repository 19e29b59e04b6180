"""CIFAR-10 and CIFAR-100, downloaded by torchvision."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10 as Published
from torchvision.datasets import CIFAR100 as Published100
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.errors import UserError
from cifarnet.system.files import downloading, find_or_fetch, scratch_folder


class CIFAR10(ImageDataModule):
    """60,000 photographs of ten classes, 32×32 pixels (Krizhevsky, 2009); downloaded once into `root`.

    Args:
        root: the folder of the archive `cifar-10-python.tar.gz` and its extracted files.
        url: the URL of the archive; None uses the official one.
        settings: the settings of `ImageDataModule`.

    Raises:
        NoImages: `root` does not contain the extracted files, and `read_only` is set.
        UserError: the archive cannot be downloaded, or a file in `root` differs from the published one.
    """

    NAME = "CIFAR-10"
    PUBLISHED = Published

    def __init__(self, root: str = "data", url: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.url = url or self.PUBLISHED.url

    def read(self) -> Source:
        folder = self.root / self.PUBLISHED.base_folder
        missing = f"{folder} does not exist" if self.read_only else None
        find_or_fetch(self.NAME, self.root, folder.exists, self._fetch, missing)
        try:
            published = [self.PUBLISHED(self.root, train=train) for train in (True, False)]
        except RuntimeError as error:  # a checksum differs
            raise UserError(f"{folder} differs from the published files. Delete it and start again.") from error
        train, test = (Split(torch.from_numpy(x.data).permute(0, 3, 1, 2), torch.tensor(x.targets)) for x in published)
        return Source(published[0].classes, train, test)

    def _fetch(self) -> None:
        """Download and extract the archive in a scratch folder, then rename it: the folder is always complete."""
        archive = self.root / self.PUBLISHED.filename
        with scratch_folder(self.root) as scratch:
            if not archive.exists():
                with downloading(f"{self.NAME} cannot be downloaded from {self.url}", self._remedies()):
                    download_url(self.url, scratch, archive.name, self.PUBLISHED.tgz_md5)
                (scratch / archive.name).rename(archive)
            elif not check_integrity(archive, self.PUBLISHED.tgz_md5):
                raise UserError(f"{archive} differs from the published archive. Delete it, then:\n{self._remedies()}")
            extract_archive(archive, scratch)
            (scratch / self.PUBLISHED.base_folder).rename(self.root / self.PUBLISHED.base_folder)

    def _remedies(self) -> str:
        return (
            f"  - manually: put {self.PUBLISHED.filename} (md5 {self.PUBLISHED.tgz_md5}) into {self.root.resolve()}\n"
            f"  - from a mirror: data.url=https://…/{self.PUBLISHED.filename}\n"
            "  - offline: data=synthetic (or +experiment=quickstart) generates pictures"
        )


class CIFAR100(CIFAR10):
    """60,000 photographs of 100 classes, 32×32 pixels (Krizhevsky, 2009); downloaded once into `root`.

    Args:
        root: the folder of the archive `cifar-100-python.tar.gz` and its extracted files.
        url: the URL of the archive; None uses the official one.
        coarse: use the 20 superclasses, each of which contains five classes.
        settings: the settings of `ImageDataModule`.

    Raises:
        NoImages, UserError: as for `CIFAR10`.
    """

    NAME = "CIFAR-100"
    PUBLISHED = Published100

    def __init__(self, root: str = "data", url: str | None = None, coarse: bool = False, **settings: Any) -> None:
        super().__init__(root, url, **settings)
        self.coarse = coarse

    def read(self) -> Source:
        source, folder = super().read(), self.root / self.PUBLISHED.base_folder
        if self.coarse:  # the checksums of the files were verified
            files = [(folder / name).read_bytes() for name in ("meta", "train", "test")]
            meta, train, test = (pickle.loads(content, encoding="latin1") for content in files)
            source.class_names = meta["coarse_label_names"]
            source.train.labels, source.test.labels = (torch.tensor(part["coarse_labels"]) for part in (train, test))
        return source
