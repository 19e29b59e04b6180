"""CIFAR-10 as its authors publish it, by torchvision."""

import errno
import shutil
import tempfile
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10 as Published
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.errors import UserError
from cifarnet.system.files import locked

SCRATCH = ".unfinished-"


class CIFAR10(ImageDataModule):
    """60,000 photographs of ten classes, 32×32 pixels (Krizhevsky, 2009); downloaded once into `root`.

    Args:
        root: folder of the archive `cifar-10-python.tar.gz` and what is unpacked from it.
        url: where to download the archive instead of the official address.
        settings: those of `ImageDataModule`.

    Raises:
        UserError: the archive cannot be downloaded, or a file in `root` is not the published one.
    """

    def __init__(self, root: str = "data", url: str | None = None, **settings) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.url = url or Published.url

    def read(self) -> Source:
        folder, archive = self.root / Published.base_folder, self.root / Published.filename
        if folder.exists():
            self._check(folder)
        else:
            try:
                with locked(self.root, f"Another process prepares CIFAR-10 in {self.root}: waiting for it."):
                    if not folder.exists():
                        self._fetch(archive)
            except OSError as error:
                raise UserError(f"data.root={self.root}: CIFAR-10 cannot be put there ({error.strerror}).") from error
        parts = [Published(self.root, train=train) for train in (True, False)]
        train, test = (Split(torch.from_numpy(of.data).permute(0, 3, 1, 2), torch.tensor(of.targets)) for of in parts)
        return Source(parts[0].classes, train, test)

    def _fetch(self, archive: Path) -> None:
        """All or nothing: download and unpack beside the final place, then rename."""
        for left in self.root.glob(f"{SCRATCH}*"):  # by a process that was killed meanwhile
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=SCRATCH) as scratch:
            if not archive.exists():
                self._download(Path(scratch, archive.name))
                Path(scratch, archive.name).rename(archive)
            elif not check_integrity(archive, Published.tgz_md5):
                raise UserError(f"{archive} is not the published archive (cut short?). Delete it.\n{self._by_hand()}")
            extract_archive(archive, scratch)
            folder = Path(scratch, Published.base_folder)
            self._check(folder)
            folder.rename(self.root / folder.name)

    def _download(self, archive: Path) -> None:
        try:
            download_url(self.url, archive.parent, archive.name, Published.tgz_md5)
        except Exception as error:  # torchvision lets through whatever urllib and http raise
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"CIFAR-10 could not be downloaded from {self.url}: {reason}\n{self._by_hand()}") from error

    def _check(self, folder: Path) -> None:
        """Compare the unpacked files with torchvision's checksums."""
        meta = (Published.meta["filename"], Published.meta["md5"])
        for name, md5 in [*Published.train_list, *Published.test_list, meta]:
            if not check_integrity(folder / name, md5):
                state = "has a wrong checksum" if (folder / name).exists() else "is missing"
                raise UserError(f"{folder / name} {state}: delete the folder {folder} and start again.")

    def _by_hand(self) -> str:
        return (
            f"  - by hand: put {Published.filename} (md5 {Published.tgz_md5}) into {self.root.resolve()}\n"
            f"  - from a mirror: data.url=https://…/{Published.filename}\n"
            "  - without a network: data=synthetic (or +experiment=quickstart) draws its own pictures"
        )
