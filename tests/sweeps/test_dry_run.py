import json
import re
import shutil
import statistics

import pytest

from cifarnet import search
from conftest import SMALL, small
from example_record import write_record

TINY = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks.pictures=null", "~logger", "threads=1"]
DRY = "hydra.sweeper.dry_run=true"


def rows(printed: str) -> list[list[str]]:
    """Return the words of each row of the printed table."""
    return [line.split() for line in printed.partition("All jobs")[0].splitlines() if re.match(r"  \d", line)]


def record(folder, *overrides, seconds: float, **changes):
    """Write the record of a run of the settings of TINY with overrides."""
    from omegaconf import OmegaConf

    composed = small(*TINY[len(SMALL) :], *overrides)
    write_record(
        folder, config=OmegaConf.to_container(composed), fit_seconds=1, compile_seconds=2, seconds=seconds, **changes
    )


def test_the_estimate_is_the_mean_over_runs_that_differ_only_in_the_seed(command, tmp_path):
    logs = tmp_path / "lightning_logs"
    for seed, seconds in enumerate([10, 20, 60]):
        record(logs / f"a/{seed}", "optimizer.lr=0.01", f"seed={seed}", seconds=seconds, test_seconds=3)
    record(logs / "b", "optimizer.lr=0.02", "name=other", "sweep.keep_checkpoints=3", seconds=100, test_seconds=4)
    record(logs / "c", "optimizer.lr=0.03", "threads=2", seconds=1000)
    record(logs / "d", "optimizer.lr=0.03", "model.hidden=17", seconds=1000)
    (logs / "e").mkdir()
    (logs / "e/metrics.json").write_text('{"accuracy": 1}')
    before = sorted(tmp_path.rglob("*"))
    status, printed, error = command("-m", *TINY, "optimizer.lr=0.01,0.02,0.03", "seed=7,8", DRY)
    assert status == 0, error
    first, second = 1 + 2 + statistics.mean([10, 20, 60]) + 3, 1 + 2 + 100 + 4
    expected = [
        ("0.01", "7", first, "3"),
        ("0.01", "8", first, "3"),
        ("0.02", "7", second, "1"),
        ("0.02", "8", second, "1"),
    ]
    assert rows(printed)[:4] == [[str(job), *row[:2], f"{row[2]:.2f}", row[3]] for job, row in enumerate(expected)]
    assert rows(printed)[4:] == [["4", "0.03", "7", "unknown"], ["5", "0.03", "8", "unknown"]]
    assert f"{2 * first + 2 * second:.2f} s" in printed
    assert "4 of 6 jobs" in printed
    assert "No estimate for jobs 4, 5: lightning_logs contains no run" in printed
    assert "model.hidden=16" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_resumed_sweep_estimates_only_the_missing_jobs(command, tmp_path):
    begin = ["-m", *TINY, "optimizer.lr=0.01,0.02", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert command(*begin)[0] == 0
    shutil.rmtree(tmp_path / "sweep/2")
    left = json.loads((tmp_path / "sweep/3/metrics.json").read_text())
    seconds = sum(left[name] for name in ("fit_seconds", "compile_seconds", "seconds", "test_seconds"))
    before = sorted(tmp_path.rglob("*"))
    status, printed, error = command("sweep.resume=sweep", DRY, "hydra/launcher=parallel")
    assert status == 0, error
    assert [row[3:] for row in rows(printed)] == [["done"], ["done"], [f"{seconds:.2f}", "1"], ["done"]]
    assert "2 jobs run at a time" in printed
    assert sorted(tmp_path.rglob("*")) == before
    status, printed, error = command("sweep.resume=sweep")
    assert (status, "4 of 4 jobs done" in printed) == (0, True), error


def test_the_estimate_finds_runs_of_a_trained_network(command, run, tmp_path):
    chosen = ["model=trained", f"model.checkpoint={run}", *(line for line in TINY if not line.startswith("model."))]
    assert command(*chosen, "start.optimizer=false")[0] == 0
    status, printed, error = command("-m", *chosen, "seed=3,4", DRY)
    assert status == 0, error
    assert [row[-1] for row in rows(printed)] == ["1", "1"]


@pytest.mark.parametrize("setting", ["hydra.sweeper.zip=true", DRY])
def test_a_single_run_and_a_search_refuse_the_settings_of_a_sweep(command, tmp_path, setting):
    for arguments, main in [([], {}), (["optimizer.lr=0.1,0.2"], {"main": search.main})]:
        status, _, error = command(*TINY, *arguments, setting, **main)
        assert status == 1
        assert error.startswith(f"Error: {setting.partition('=')[0]}")
        assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.ckpt"))
