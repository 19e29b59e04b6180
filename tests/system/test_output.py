import os
import sys

import pytest

from cifarnet.system.output import Output
from conftest import SMALL


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("make", [closed_pipe, lambda: None], ids=["| head -1", ">&-"])
def test_a_run_is_completed_without_its_output(command, tmp_path, monkeypatch, stream, make):
    """Python sets a stream that is closed at the start to None."""
    monkeypatch.setattr(sys, stream, make())
    status, out, error = command(*SMALL, "hydra.run.dir=run")
    assert status == 0, out + error
    assert (tmp_path / "run/metrics.json").is_file()
    assert "test accuracy" in (tmp_path / "run/train.log").read_text()


def test_output_is_discarded_from_the_first_failure_on():
    with closed_pipe() as stream:
        output = Output(stream)
        output.write("a" * 10**6)
        output.flush()
        print("more", file=stream, flush=True)  # also by those who hold the stream


def test_other_errors_of_the_output_are_raised():
    with open("/dev/full", "w") as full:
        output = Output(full)
        output.write("text")
        with pytest.raises(OSError, match="No space left"):
            output.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for the buffered text
