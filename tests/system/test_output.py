import os
import subprocess
import sys

import pytest

from cifarnet.errors import UserError
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


def test_other_errors_of_the_output_are_reported_once():
    with open("/dev/full", "w") as full:
        output = Output(full)
        output.write("text")
        with pytest.raises(UserError, match=r"^The output cannot be written: No space left.*redirect"):
            output.flush()
        output.write("more")
        output.flush()


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], [*SMALL, "trainer.max_epochs=1"]])
def test_an_output_on_a_full_disk_is_reported_in_one_line(arguments, tmp_path):
    command = [sys.executable, "-m", "cifarnet.train", *arguments]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: The output cannot be written: No space left")
    assert run.stderr.count("\n") == 1, run.stderr
