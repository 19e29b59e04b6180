import errno
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from cifarnet.errors import UserError
from cifarnet.system.checkpoint_io import CheckpointIO, check_state


def test_content_that_was_read_is_handed_out_once(tmp_path):
    """Its memory is free afterwards, and the best checkpoint is read from its file."""
    content = {"step": 1}
    checkpoints = CheckpointIO(content)
    checkpoints.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert checkpoints.load_checkpoint(tmp_path / "last.ckpt") is content
    assert checkpoints.load_checkpoint(tmp_path / "last.ckpt") == {"step": 2}


def test_arguments_are_passed_on_when_a_file_is_read(tmp_path):
    checkpoints, path = CheckpointIO(), tmp_path / "last.ckpt"
    torch.save({"weight": torch.ones(3)}, path)
    assert checkpoints.load_checkpoint(path, "meta")["weight"].device.type == "meta"
    torch.save({"class": Path}, path)
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load_checkpoint(path, weights_only=True)
    assert checkpoints.load_checkpoint(path, weights_only=False) == {"class": Path}


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoints, path = CheckpointIO(), tmp_path / "below/last.ckpt"
    checkpoints.save_checkpoint({"weight": torch.zeros(3)}, path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_checkpoint({"weight": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize(
    "path", ["outside.ckpt", "run/../outside.ckpt", "run/notes.txt", "run/out/x.ckpt", "runs/x.ckpt"]
)
def test_a_resumed_run_writes_and_removes_only_checkpoints_in_its_folder(tmp_path, path):
    for folder in ("run", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run/out").symlink_to(tmp_path)
    (tmp_path / path).write_text("mine")
    checkpoints = CheckpointIO({}, tmp_path / "run")
    with pytest.raises(UserError, match="is outside the run's folder"):
        checkpoints.save_checkpoint({}, tmp_path / path)
    checkpoints.remove_checkpoint(tmp_path / path)
    assert (tmp_path / path).read_text() == "mine"
    checkpoints.save_checkpoint({}, tmp_path / "run/below/x.ckpt")
    checkpoints.remove_checkpoint(tmp_path / "run/below/x.ckpt")
    assert not (tmp_path / "run/below/x.ckpt").exists()


@pytest.mark.parametrize("folder", [None, Path()])
def test_only_regular_files_are_removed(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "mine.ckpt").touch()
    (tmp_path / "link.ckpt").symlink_to("mine.ckpt")
    for name in ("folder.ckpt", "link.ckpt", "nosuch.ckpt", ".", ".."):
        CheckpointIO(folder=folder).remove_checkpoint(name)
    assert sorted(os.listdir()) == ["folder.ckpt", "link.ckpt", "mine.ckpt"]
    CheckpointIO(folder=folder).remove_checkpoint("mine.ckpt")
    assert not os.path.exists("mine.ckpt")


class Part:
    """A callback with this state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("value", [Path, Part(0), lambda: 0, threading.Lock()], ids=["class", "object", "code", "lock"])
def test_a_state_that_contains_an_object_is_refused(value, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # changes only the default of torch.load
    with pytest.raises(UserError, match=r"^Part: .* resumed: \w.*tensors.* state_dict\(\)\.$") as refusal:
        check_state(Part({"x": [value]}))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"resumed: .*pickle.*lock"):
        check_state(Part(threading.Lock()))
    check_state(Part({"x": [1, 2.0, "text", None, True], "y": {"z": torch.zeros(2)}}))
