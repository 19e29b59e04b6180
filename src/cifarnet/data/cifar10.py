"""CIFAR-10 as its authors publish it, by torchvision."""

import shutil
import tempfile
from pathlib import Path

import torch
import torchvision
from torchvision.datasets.utils import check_integrity, extract_archive

from cifarnet.data.datamodule import ImageDataModule, Source, Split
from cifarnet.errors import UserError


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
        self.url = url or torchvision.datasets.CIFAR10.url

    def _prepare(self) -> None:
        """Download and unpack what is missing, and check what is there."""
        published = torchvision.datasets.CIFAR10
        folder, archive = self.root / published.base_folder, self.root / published.filename
        if folder.exists():
            self._check(folder)
        elif archive.exists():
            if not check_integrity(str(archive), published.tgz_md5):
                raise UserError(f"{archive} is not the published archive (cut short?). Delete it.\n{self._by_hand()}")
            self._unpack(archive)
        else:
            self._download()

    def _check(self, folder: Path) -> None:
        """Compare the unpacked files with torchvision's checksums."""
        published = torchvision.datasets.CIFAR10
        meta = (published.meta["filename"], published.meta["md5"])
        for name, md5 in [*published.train_list, *published.test_list, meta]:
            if not check_integrity(str(folder / name), md5):
                state = "has a wrong checksum" if (folder / name).exists() else "is missing"
                raise UserError(f"{folder / name} {state}: delete the folder {folder} and start again.")

    def _unpack(self, archive: Path) -> None:
        """All or nothing: unpack beside the final place, then rename."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".unpack-") as scratch:
            extract_archive(str(archive), scratch)
            name = torchvision.datasets.CIFAR10.base_folder
            self._check(Path(scratch) / name)
            (Path(scratch) / name).rename(self.root / name)

    def _download(self) -> None:
        """All or nothing: download into a folder of its own, then move the archive to its place."""

        class Mirror(torchvision.datasets.CIFAR10):
            url = self.url

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".download-") as scratch:
                Mirror(scratch, download=True)
                for name in (Mirror.filename, Mirror.base_folder):
                    shutil.move(Path(scratch) / name, self.root / name)
        except Exception as error:  # torchvision lets through whatever urllib, http and tarfile raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"CIFAR-10 could not be downloaded from {self.url}: {reason}\n{self._by_hand()}") from error

    def _by_hand(self) -> str:
        published = torchvision.datasets.CIFAR10
        return (
            f"  - by hand: put {published.filename} (md5 {published.tgz_md5}) into {self.root.resolve()}\n"
            f"  - from a mirror: data.url=https://…/{published.filename}\n"
            "  - without a network: data=synthetic (or +experiment=quickstart) draws its own pictures"
        )

    def read(self) -> Source:
        self._prepare()
        train, test = (torchvision.datasets.CIFAR10(str(self.root), train=train) for train in (True, False))
        return Source(
            class_names=train.classes,
            train=Split(torch.from_numpy(train.data).permute(0, 3, 1, 2), torch.tensor(train.targets)),
            test=Split(torch.from_numpy(test.data).permute(0, 3, 1, 2), torch.tensor(test.targets)),
        )
