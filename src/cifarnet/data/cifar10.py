"""CIFAR-10, downloaded by torchvision."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10 as Published
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.errors import NoImages, UserError, reason
from cifarnet.system.files import DISK_ERRORS, locked

SCRATCH = ".unfinished-"


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

    def __init__(self, root: str = "data", url: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.url = url or Published.url

    def read(self) -> Source:
        folder = self.root / Published.base_folder
        if self.read_only and not folder.exists():
            raise NoImages(
                f"{folder} does not exist, and data that a checkpoint chooses is not downloaded. Set data.root to its "
                "parent folder, or allow the download with data.read_only=false."
            )
        try:
            if not folder.exists():
                with locked(self.root, f"Another process is preparing CIFAR-10 in {self.root}: waiting for it."):
                    if not folder.exists():
                        self._fetch(self.root / Published.filename)
        except OSError as error:
            problem = f"CIFAR-10 cannot be stored there ({error.strerror})"
            raise UserError(f"data.root={self.root}: {problem}. Choose another data.root.") from error
        try:
            published = [Published(self.root, train=train) for train in (True, False)]
        except RuntimeError as error:  # a checksum differs
            raise UserError(f"{folder} differs from the published files. Delete it and start again.") from error
        train, test = (Split(torch.from_numpy(x.data).permute(0, 3, 1, 2), torch.tensor(x.targets)) for x in published)
        return Source(published[0].classes, train, test)

    def _fetch(self, archive: Path) -> None:
        """Download and extract the archive in a scratch folder, then rename it: the folder is always complete."""
        for scratch in self.root.glob(f"{SCRATCH}*"):  # left by processes that were killed
            shutil.rmtree(scratch, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=SCRATCH) as scratch:
            if not archive.exists():
                self._download(Path(scratch, archive.name))
                Path(scratch, archive.name).rename(archive)
            elif not check_integrity(archive, Published.tgz_md5):
                raise UserError(
                    f"{archive} differs from the published archive. Delete it, and then:\n{self._remedies()}"
                )
            extract_archive(archive, scratch)
            Path(scratch, Published.base_folder).rename(self.root / Published.base_folder)

    def _download(self, archive: Path) -> None:
        try:
            download_url(self.url, archive.parent, archive.name, Published.tgz_md5)
        except Exception as error:  # urllib, http and torchvision raise many types
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            message = f"CIFAR-10 cannot be downloaded from {self.url}: {reason(error)}. Choose one:"
            raise UserError(f"{message}\n{self._remedies()}") from error

    def _remedies(self) -> str:
        return (
            f"  - manually: put {Published.filename} (md5 {Published.tgz_md5}) into {self.root.resolve()}\n"
            f"  - from a mirror: data.url=https://…/{Published.filename}\n"
            "  - offline: data=synthetic (or +experiment=quickstart) generates pictures"
        )
