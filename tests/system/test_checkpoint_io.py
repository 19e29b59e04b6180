import errno
import os

import pytest
import torch

from cifarnet.system.checkpoint_io import CheckpointIO


def test_content_that_was_read_is_handed_out_once(tmp_path):
    """Its memory is free afterwards, and the best checkpoint is read from its file."""
    content = {"step": 1}
    checkpoints = CheckpointIO(content)
    checkpoints.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert checkpoints.load_checkpoint(tmp_path / "last.ckpt") is content
    assert checkpoints.load_checkpoint(tmp_path / "last.ckpt") == {"step": 2}


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
