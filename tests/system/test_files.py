import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from cifarnet import cli
from cifarnet.errors import UserError, printable
from cifarnet.system import files


def full_disk(monkeypatch):
    """From now on nothing reaches the disk."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "folder/file.txt"
    files.write(file, "first")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left") as error:
        files.write(file, b"second")
    assert error.value.filename == str(file)
    assert file.read_text() == "first"
    assert os.listdir(file.parent) == ["file.txt"]
    told = cli.explain(error.value)
    assert f"{file} cannot be written: No space left on device" in told
    assert "\n" not in told


def work(folder: Path, entered, leave):
    with files.exclusive(folder):
        entered.set()
        leave.wait(60)


def test_one_process_works_in_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=work, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(60)
    with pytest.raises(UserError, match="Another process is at work"), files.exclusive(tmp_path):
        pass
    other.kill()  # the lock ends with it
    other.join()
    gone = tmp_path / f".last.ckpt.{other.pid}.tmp"
    kept = [tmp_path / f"below/.metrics.json.{os.getppid()}.tmp", tmp_path / ".mine.tmp", tmp_path / ".folder.1.tmp/x"]
    for path in (gone, *kept):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with files.exclusive(tmp_path):
        assert not gone.exists()
        assert all(path.exists() for path in kept)  # of a process at work, and of another program


def test_only_an_unused_folder_is_removed(tmp_path):
    for name, used in [("unused", False), ("used", True)]:
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "train.log").touch()
        if used:
            (tmp_path / name / "metrics.json").touch()
        files.remove_if_unused(tmp_path / name)
        assert (tmp_path / name).exists() == used


@pytest.mark.parametrize("mine", ["notes.log", "below/train.log", "old/.hydra/config.yaml", ".hydra/mine.yaml"])
def test_what_another_made_is_not_removed(tmp_path, mine):
    for name in (".hydra/config.yaml", "train.log", mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files.remove_if_unused(tmp_path)
    assert (tmp_path / mine).exists()


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").symlink_to("best.ckpt")
    (tmp_path / "latest").symlink_to("run")
    files.refuse_links(tmp_path / "latest")
    (tmp_path / "run/train.log").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"train\.log is a link that leads out of .*latest\. Remove it"):
        files.refuse_links(tmp_path / "latest")


def test_names_do_not_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\u202ec\x9b\nünï\t🐈") == "a\\x1b[2Jb\\x07\\u202ec\\x9b\nünï\t🐈"
