import math
from dataclasses import replace
from pathlib import Path

import pytest

from cifarnet.errors import UserError
from cifarnet.records import tables
from cifarnet.records.record import Record
from cifarnet.records.tables import Run
from cifarnet.system import files
from example_record import RECORD, write_record


def make(settings: dict[str, str], **numbers: float) -> Run:
    return Run(Path("runs"), settings, numbers=numbers)


def finished(seed: int, date: str, accuracy: float) -> Run:
    changes = {"seed": seed, "finished": date, "val_accuracy": accuracy, "seconds": accuracy}
    record = Record(**RECORD | {"sessions": [], **changes})
    return Run(Path("runs"), {}, record=record, numbers=record.numbers())


def test_a_job_is_what_its_folder_describes(tmp_path):
    files = [("error.txt", "it exploded\n"), ("pruned.txt", "after 2"), ("x", "")]
    for number, (file, text) in enumerate([("metrics.json", ""), *files]):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/overrides.yaml").write_text("- optimizer.lr=0.1\n- ~logger\n- seed=3\n- sweep.resume='a=b'\n")
        (folder / file).write_text(text)
    write_record(tmp_path / "0", val_accuracy=0.8)
    (tmp_path / "10/.hydra").mkdir(parents=True)
    (tmp_path / "evaluation").mkdir()
    runs = tables.read_sweep(tmp_path)
    assert [run.folder.name for run in runs] == ["0", "1", "2", "3", "10"]
    assert [run.status for run in runs] == ["done", "failed", "pruned", "cut off", "cut off"]
    assert (runs[1].note, runs[2].note) == ("it exploded", "after 2")
    assert runs[0].settings == {"optimizer.lr": "0.1", "~logger": "", "seed": "3"}
    assert (runs[0].score, runs[0].numbers["seconds"]) == (0.8, 13)
    assert math.isnan(runs[1].score)
    assert "tta" not in runs[0].numbers


def test_an_unreadable_file_makes_a_job_damaged(tmp_path):
    write_record(tmp_path)
    (tmp_path / ".hydra").mkdir()
    overrides = tmp_path / ".hydra/overrides.yaml"
    for content in (b"- a=1\n\xff\n", b"a: {", b"3", b"- [1]"):
        overrides.write_bytes(content)
        with pytest.raises(UserError, match=r"overrides\.yaml cannot be read: "):
            tables.overrides(tmp_path)
        assert tables.read_run(tmp_path).status == "damaged"
    overrides.write_text("- a=1\n")
    assert tables.read_run(tmp_path).status == "done"
    (tmp_path / "metrics.json").write_text('{"val_accuracy": 0.')
    run = tables.read_run(tmp_path)
    assert (run.status, run.record, run.numbers, run.settings) == ("damaged", None, {}, {"a": "1"})
    assert "metrics.json cannot be read" in run.note
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "error.txt").write_bytes(b"\xff")
    assert "error.txt cannot be read" in tables.read_run(tmp_path).note


def test_a_file_that_is_missing_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"x cannot be read: .*No such file.* Remove it\.$"):
        files.read(tmp_path / "x", str.strip, ". Remove it")


def test_the_best_group_comes_first_and_groups_without_a_value_last():
    accuracies = [("a", 0.5), ("b", None), ("c", 0.7), ("a", 0.6), ("c", None)]
    runs = [
        make({"model": model, "seed": str(seed)}, **({} if value is None else {"val_accuracy": value}))
        for seed, (model, value) in enumerate(accuracies)
    ]
    best, second, last = tables.grouped(runs, "val_accuracy")
    assert [group.settings for group in (best, second, last)] == [{"model": "c"}, {"model": "a"}, {"model": "b"}]
    assert (best.mean, len(best.runs), len(best.values)) == (0.7, 2, 1)
    assert math.isnan(best.deviation)
    assert (second.mean, second.deviation) == (pytest.approx(0.55), pytest.approx(0.1 / math.sqrt(2)))
    assert math.isnan(last.mean)


@pytest.mark.parametrize(("metric", "best"), [("test_accuracy", 3), ("test_cross_entropy", 1), ("seconds", 1)])
def test_which_value_is_the_best(metric, best):
    runs = [make({"a": str(value)}, **{metric: value}) for value in (2, 1, 3)]
    assert tables.grouped(runs, metric)[0].mean == best


def test_only_the_last_run_of_a_seed_counts_except_for_times():
    runs = [finished(0, "2026-11-23", 0.9), finished(1, "2026-11-22", 0.8), finished(0, "2026-11-21", 0.1)]
    [group] = tables.grouped(runs, "val_accuracy")
    assert sorted(group.values) == [0.8, 0.9]
    assert group.repeats == [runs[2]]
    group = replace(group, metric="seconds")
    assert (len(group.values), group.repeats) == (3, [])


@pytest.mark.parametrize(
    ("first", "second", "varying"),
    [
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, ["b"]),
        ({"a": "1"}, {}, ["a"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "B", "m.y": "1"}, ["m._target_"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "B", "m.x": "2"}, ["m._target_", "m.x"]),
        ({"m._target_": "A", "m.x": "1"}, {"m._target_": "A"}, ["m.x"]),
        ({"m._target_": "A", "m.n.x": "1"}, {"m._target_": "B"}, ["m._target_"]),
    ],
)
def test_which_settings_vary(first, second, varying):
    assert tables.varied([make(first), make(second)]) == varying


def test_cells_are_aligned():
    assert tables.column_table({"": ["long", "a"], "n": ["1", ""]}) == "        n\n  long  1\n  a"
    assert tables.row_table({"long": "1", "a": "2"}) == "\n  long  1\n  a     2\n"


def test_accuracies_are_written_in_percent():
    [group] = tables.grouped(
        [make({"seed": str(seed)}, val_accuracy=0.8 + seed / 10) for seed in (0, 1)], "val_accuracy"
    )
    assert group.result() == "85.00 ± 7.07%"
    assert replace(group, runs=group.runs[:1]).result() == "80.00%"
    assert replace(group, metric="seconds").result() == ""
    assert (tables.number(0.02, "test_cross_entropy", "+"), tables.number(1234.5, "seconds")) == ("+0.0200", "1,234.50")


@pytest.mark.parametrize("images", [1, 9, 10, 99, 100, 101, 300, 1000, 1001, 10_000, 50_000])
def test_percentages_have_the_decimals_that_the_number_of_images_supports(images):
    """One image more changes the text, unless two decimals are too few; a decimal less would hide some images."""
    decimals = tables.decimals(images)
    texts = [tables.percent(count / images, images) for count in range(images + 1)]
    assert decimals == 2 or len(set(texts)) >= min(images, 100) + 1
    assert decimals == 0 or 1 / images < 0.1 ** (decimals + 1)
    assert texts[0] == f"{0:.{decimals}%}"


def test_accuracies_of_few_images():
    group = tables.grouped([make({"seed": "0"}, val_accuracy=0.4)], "val_accuracy")[0]
    assert [group.result(), group.images] == ["40.00%", None]
    group.records = [Record(**{**RECORD, "data": {**RECORD["data"], "val": 100}, "sessions": []})]
    assert [group.result(), group.images] == ["40%", 100]
    group.records *= 3
    assert [group.result(), group.images] == ["40.0%", 300]


def test_long_numbers_are_shortened():
    values = ["0.1", "0.00123456789", "[32,32,64,64]", "1e-05"]
    assert [tables.shorten(value) for value in values] == ["0.1", "0.001235", "[32,32,64,64]", "1e-05"]
