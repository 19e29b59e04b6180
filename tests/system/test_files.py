import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from cifarnet import cli
from cifarnet.errors import UserError, csv_cell, printable
from cifarnet.system import files
from conftest import special


def full_disk(monkeypatch):
    """Let every write to the disk fail."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    file = tmp_path / "folder/file.txt"
    files.write(file, "first")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left") as error:
        files.write(file, b"second")
    assert error.value.filename == str(file)
    assert file.read_text() == "first"
    assert os.listdir(file.parent) == ["file.txt"]
    message = cli.explain(error.value)
    assert f"{file} cannot be written: No space left on device" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    special(tmp_path / "output", kind, "/dev/full")
    before = (tmp_path / "output").lstat()
    with pytest.raises(UserError, match=r"output cannot be written: it is not a regular file\. Choose another path\."):
        files.write(tmp_path / "output", b"content")
    after = (tmp_path / "output").lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert os.listdir(tmp_path) == ["output"]


def occupy(folder: Path, entered, leave):
    with files.exclusive(folder):
        entered.set()
        leave.wait(60)


def test_one_process_at_a_time_uses_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=occupy, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(60)
    with pytest.raises(UserError, match="Another process is using"), files.exclusive(tmp_path):
        pass
    other.kill()  # which releases the lock
    other.join()
    leftover = tmp_path / f".last.ckpt.{other.pid}.00112233.tmp"
    kept = [
        tmp_path / f"below/.metrics.json.{os.getppid()}.00112233.tmp",
        tmp_path / ".mine.tmp",
        tmp_path / ".folder.1.tmp/x",
    ]
    for path in (leftover, *kept):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with files.exclusive(tmp_path):
        assert not leftover.exists()
        assert all(path.exists() for path in kept)  # of a running process, and of another program


def test_an_error_in_a_folder_names_the_folder(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, files.exclusive(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"{tmp_path} cannot be written: No space left on device" in str(cli.explain(error.value))


def test_only_an_unused_folder_is_removed(tmp_path):
    for name, used in [("unused", False), ("used", True)]:
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "train.log").touch()
        if used:
            (tmp_path / name / "metrics.json").touch()
        files.remove_if_unused(tmp_path / name)
        assert (tmp_path / name).exists() == used


@pytest.mark.parametrize("mine", ["notes.log", "below/train.log", "old/.hydra/config.yaml", ".hydra/mine.yaml"])
def test_a_folder_with_files_of_others_is_not_removed(tmp_path, mine):
    for name in (".hydra/config.yaml", "train.log", mine):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files.remove_if_unused(tmp_path)
    assert (tmp_path / mine).exists()


def test_a_folder_with_logged_metrics_is_not_removed(tmp_path):
    log = tmp_path / "run/events.out.tfevents.1"
    for size, is_kept in [(200, True), (88, False)]:
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(bytes(size))
        files.remove_if_unused(tmp_path / "run")
        assert log.exists() == is_kept


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").symlink_to("best.ckpt")
    (tmp_path / "latest").symlink_to("run")
    files.refuse_links(tmp_path / "latest")
    (tmp_path / "run/train.log").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"train\.log is a link to a place outside .*latest\. Replace it"):
        files.refuse_links(tmp_path / "latest")


def test_control_characters_are_escaped():
    assert printable("a\x1b[2Jb\x07\u202ec\x9b\nünï\t🐈") == "a\\x1b[2Jb\\x07\\u202ec\\x9b\nünï\t🐈"


def test_links_are_replaced_and_not_followed(tmp_path, monkeypatch):
    """A folder of a stranger may contain links with the names of outputs and of temporary files."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    temporary = tmp_path / f"run/.metrics.json.{os.getpid()}.00000000.tmp"
    for link in (tmp_path / "run/metrics.json", tmp_path / f"run/.metrics.json.{os.getpid()}.tmp", temporary):
        link.symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "run/metrics.json", "theirs")
    temporary.unlink(missing_ok=True)
    files.write(tmp_path / "run/metrics.json", "theirs")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "run/metrics.json").is_symlink()


def test_a_written_file_has_the_permissions_of_a_new_file(tmp_path):
    files.write(tmp_path / "written", "")
    (tmp_path / "opened").touch()
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "opened").stat().st_mode


def test_only_checkpoint_files_are_removed_from_a_run(tmp_path):
    names = ["best.ckpt", "val/accuracy=0.5.ckpt", "notes.txt", "folder.ckpt/mine"]
    for name in names:
        (tmp_path / "run/checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/checkpoints" / name).touch()
    (tmp_path / "run/checkpoints/link.ckpt").symlink_to("notes.txt")
    files.remove_checkpoints(tmp_path / "run")
    found = {path.relative_to(tmp_path / "run/checkpoints").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    assert found == {"notes.txt", "folder.ckpt", "link.ckpt"}
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    (tmp_path / "other/checkpoints/last.ckpt").touch()
    files.remove_checkpoints(tmp_path / "other")
    assert not (tmp_path / "other/checkpoints").exists()


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "-", "-x.jpg"]
)
def test_formulas_get_an_apostrophe(text):
    assert csv_cell(text) == f"'{text}"
    assert csv_cell(Path(text)) == f"'{text}"


@pytest.mark.parametrize("value", ["cat", "a=b", "", None, 0.5, -0.5, "-0.5", "+1e-3", "-inf", "'quoted"])
def test_other_cells_are_not_changed(value):
    assert csv_cell(value) is value
