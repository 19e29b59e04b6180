import json
import math
from pathlib import Path

import pytest

from cifarnet.errors import UserError
from cifarnet.records import tables
from cifarnet.records.tables import Run


def make(settings: dict[str, str], **metrics: float | str | None) -> Run:
    return Run(Path("runs"), settings, metrics)


def test_a_job_as_its_folder_tells(tmp_path):
    for number, (file, text) in enumerate(
        [
            ("metrics.json", '{"val_accuracy": 0.9}'),
            ("error.txt", "it exploded\n"),
            ("pruned.txt", "after 2"),
            ("x", ""),
        ]
    ):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/overrides.yaml").write_text("- optimizer.lr=0.1\n- ~logger\n- seed=3\n- sweep.resume='a=b'\n")
        (folder / file).write_text(text)
    (tmp_path / "10/.hydra").mkdir(parents=True)
    (tmp_path / "evaluation").mkdir()
    runs = tables.read_sweep(tmp_path)
    assert [run.folder.name for run in runs] == ["0", "1", "2", "3", "10"]
    assert [run.status for run in runs] == ["done", "failed", "pruned", "cut off", "cut off"]
    assert (runs[1].note, runs[2].note) == ("it exploded", "after 2")
    assert runs[0].settings == {"optimizer.lr": "0.1", "~logger": "", "seed": "3"}
    assert runs[0].score == 0.9
    assert math.isnan(runs[1].score)


def test_what_is_no_number_is_none():
    run = make({}, val_accuracy=None, tta="none", on_device=True, epochs=3)
    assert run.value("epochs") == 3
    assert all(math.isnan(run.value(metric)) for metric in ("val_accuracy", "tta", "on_device", "other"))


def test_damaged_files_of_a_job_are_named(tmp_path):
    job = tmp_path / "0"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra/overrides.yaml").write_bytes(b"- a=1\n\xff\n")
    for content in ('{"val_accuracy": 0.', "[" * 100_000, "9" * 10_000):
        (job / "metrics.json").write_text(content)
        with pytest.raises(UserError, match=r"metrics\.json cannot be read: "):
            tables.read_metrics(job / "metrics.json")
        run = tables.read_run(job)
        assert (run.status, run.metrics, run.settings) == ("damaged", {}, {})
        assert "metrics.json cannot be read" in run.note
        assert "overrides.yaml cannot be read" in run.note
    (job / "metrics.json").write_text('{"val_accuracy": 0.9, "overrides": ["a=1"]}')
    run = tables.read_run(job)
    assert (run.status, run.score, run.settings) == ("done", 0.9, {"a": "1"})
    (job / "metrics.json").unlink()
    for overrides in ("a: {", "a: 1", "3", "- [a]\n- 'x=${y}'"):
        (job / ".hydra/overrides.yaml").write_text(overrides)
        assert tables.read_run(job).status in ("cut off", "damaged")
    (job / "error.txt").write_bytes(b"\xff")
    assert tables.read_run(job).status == "failed"


def test_groups_the_best_first_and_those_without_a_value_last():
    accuracies = [("a", 0.5), ("b", None), ("c", 0.7), ("a", 0.6), ("c", None)]
    runs = [make({"model": m, "seed": str(s)}, val_accuracy=v, seed=s) for s, (m, v) in enumerate(accuracies)]
    best, second, last = tables.grouped(runs, "val_accuracy")
    assert [group.settings for group in (best, second, last)] == [{"model": "c"}, {"model": "a"}, {"model": "b"}]
    assert (best.mean, len(best.runs), len(best.values)) == (0.7, 2, 1)
    assert math.isnan(best.deviation)
    assert (second.mean, second.deviation) == (pytest.approx(0.55), pytest.approx(0.1 / math.sqrt(2)))
    assert math.isnan(last.mean)
    assert len(tables.grouped(runs, "val_accuracy", alike=lambda run: run.metrics["seed"])) == 5


@pytest.mark.parametrize(("metric", "best"), [("test_accuracy", 3), ("test_cross_entropy", 1), ("seconds", 1)])
def test_what_is_best(metric, best):
    runs = [make({"a": str(value)}, **{metric: value}) for value in (2, 1, 3)]
    assert tables.grouped(runs, metric)[0].mean == best


def test_of_one_seed_the_last_run_counts_but_for_times():
    runs = [
        make({}, seed=seed, finished=finished, val_accuracy=accuracy, seconds=accuracy)
        for seed, finished, accuracy in [(0, "2026-11-23", 0.9), (1, "2026-11-22", 0.8), (0, "2026-11-21", 0.1)]
    ]
    [group] = tables.grouped(runs, "val_accuracy")
    assert sorted(group.values) == [0.8, 0.9]
    assert group.repeats == [runs[2]]
    [group] = tables.grouped(runs, "seconds")
    assert (len(group.values), group.repeats) == (3, [])


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, ["b"]),
        ({"a": "1"}, {}, ["a"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "B", "m.y": "1"}, ["m._target_"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "B", "m.x": "2"}, ["m._target_", "m.x"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "A"}, ["m.x"]),
        ({"m._target_": "A", "m.n.x": "1"}, {"m._target_": "B"}, ["m._target_"]),
    ],
)
def test_which_settings_vary(first, second, named):
    assert tables.varied([make(first), make(second)]) == named


def test_cells_are_aligned():
    assert tables.aligned({"": ["long", "a"], "n": ["1", ""]}) == "        n\n  long  1\n  a"


def test_numbers_are_shortened():
    values = ["0.1", "0.00123456789", "[32,32,64,64]", "1e-05"]
    assert [tables.short(value) for value in values] == ["0.1", "0.001235", "[32,32,64,64]", "1e-05"]


def test_json_that_is_no_dictionary_is_no_record(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps([1]))
    assert tables.read_metrics(tmp_path / "metrics.json") == {}
