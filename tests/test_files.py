import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from cifarnet import cli, files
from cifarnet.errors import UserError, printable


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
    with files.alone_in(folder):
        entered.set()
        leave.wait(60)


def test_one_process_works_in_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=work, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(60)
    with pytest.raises(UserError, match="Another process is at work"), files.alone_in(tmp_path):
        pass
    other.kill()  # the lock ends with it
    other.join()
    (tmp_path / ".last.ckpt.7.tmp").touch()
    with files.alone_in(tmp_path):
        assert not (tmp_path / ".last.ckpt.7.tmp").exists()


def test_only_an_unused_folder_is_removed(tmp_path):
    for name, used in [("unused", False), ("used", True)]:
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "train.log").touch()
        if used:
            (tmp_path / name / "metrics.json").touch()
        files.remove_if_unused(tmp_path / name)
        assert (tmp_path / name).exists() == used


def test_names_do_not_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\u202ec\x9b\nünï\t🐈") == "a\\x1b[2Jb\\x07\\u202ec\\x9b\nünï\t🐈"
