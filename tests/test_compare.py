import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cifarnet.cli import CONFIGS, compose
from cifarnet.compare import main
from cifarnet.records import comparison, figures, tables
from cifarnet.records.significance import paired, welch
from cifarnet.records.tables import varied
from conftest import SMALL
from example_record import session, write_record


@pytest.fixture
def run(tmp_path):
    """Write a run's folder: run("a/0", seed, accuracy, {"config.optimizer.lr": 0.02, "tta": "mirror"})."""

    def write(folder: str, seed: int, accuracy: float, changes: dict | None = None) -> Path:
        place = tmp_path / folder
        changes = {"val_accuracy": accuracy, "test_accuracy": accuracy} | (changes or {})
        changes = {"seed": seed, "finished": f"2026-11-22T15:{seed:0>2}", "config.seed": seed} | changes
        return write_record(place, **{"config.name": "quickstart", "config.output_dir": str(place)} | changes)

    return write


@pytest.fixture
def compared(command):
    """Run `python -m cifarnet.compare …` in this process: exit status, what was printed, and to stderr."""
    return lambda *arguments: command(*arguments, main=main)


FASTER = {"config.optimizer.lr": 0.02}


@pytest.fixture
def sweep(run):
    """A sweep of two learning rates with three seeds each, whose accuracies differ much."""
    for seed, accuracy in enumerate([0.981, 0.982, 0.983]):
        run(f"sweep/{seed}", seed, accuracy)
        run(f"sweep/{seed + 3}", seed, accuracy - 0.02, FASTER)


def test_a_record_without_the_checksum_of_its_images_is_left_out(run, compared):
    run("a/0", 0, 0.9)
    file = run("a/1", 1, 0.9) / "metrics.json"
    record = json.loads(file.read_text())
    del record["data"]["sha256"]
    file.write_text(json.dumps(record))
    status, printed, error = compared("a")
    assert (status, error) == (0, "")
    assert "Left out: a/1/metrics.json cannot be read" in printed
    status, _, error = compared("a/1")
    assert (status, error.count("\n")) == (1, 1)
    assert "sha256" in error


def test_groups_by_seed_and_names_what_differs(sweep, compared, tmp_path):
    status, printed, error = compared("sweep")
    assert status == 0, error
    lines = [line.split() for line in printed.splitlines() if line]
    assert lines[0] == ["val", "accuracy", "n", "optimizer.lr"]  # max_lr follows
    assert lines[1] == ["a", "quickstart", "98.20", "±", "0.10%", "3", "0.01"]
    assert lines[2] == ["b", "quickstart", "96.20", "±", "0.10%", "3", "0.02"]
    # error √(0.001²/3 + 0.001²/3) = 0.000816; 4 degrees of freedom: t = 2.776; 2 ± 0.23 points
    assert "a - b: +2.00 points, 95% interval +1.77 to +2.23, p = 1.6e-05: a is better" in printed
    assert "warning" not in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_control_characters_in_a_record_are_escaped(run, compared):
    run("a/0", 0, 0.9, {"config.name": "a\x1b[2J", "config.optimizer.lr": "\x1b]0;x"})
    run("b/0", 0, 0.8)
    status, printed, error = compared("a", "b")
    assert status == 0, error
    assert "\\x1b]0;x" in printed
    assert "\x1b" not in printed


def test_a_difference_that_is_not_significant(run, compared):
    for seed, accuracy in enumerate([0.90, 0.91, 0.92, 0.93]):
        run(f"a/{seed}", seed, accuracy)
        run(f"b/{seed}", seed, accuracy + 0.01, FASTER)
    _, printed, _ = compared("a", "b")
    assert "not statistically significant" in printed
    assert "is better" not in printed
    # d = 0.01/0.0129 = 0.775: 28 each (for d = 0.8, Cohen has 26)
    assert "each group needs about 28 seeds" in printed


def fold(number: int, folds: int = 5, split_seed: int = 0) -> dict:
    data = {"folds": folds, "fold": number, "split_seed": split_seed}
    config = {"_target_": "cifarnet.data.Synthetic", "root": "data", "shuffle_seed": "${seed}"}
    counts = {"source": "Synthetic", "classes": 10, "train": 8000 + number % 2, "val": 2000 - number % 2, "test": 10**4}
    return {"resolved.data": data, "config.data": config | data, "data": counts | {"sha256": "d01fbde4" * 8}}


DIFFERENCES = [0.02, 0.01, 0.03, 0.00, 0.02]  # see `test_the_corrected_paired_test_equals_a_calculation_by_hand`


def test_folds_are_paired_samples(run, compared):
    for number, (level, difference) in enumerate(zip([0.5, 0.9, 0.3, 0.7, 0.6], DIFFERENCES, strict=True)):
        run(f"a/{number}", number, level + difference, fold(number))  # each fold also has its own seed
        run(f"b/{number}", 0, level, fold(number) | FASTER)
    status, printed, _ = compared("a", "b")
    assert status == 0
    assert re.search(r"a +quickstart +61\.60 ± 2\d\.\d+% +5 ", printed)
    line = (
        "a - b: +1.60 points, 95% interval -0.52 to +3.72, paired over 5 folds, p = 0.1: not statistically significant"
    )
    assert line in printed
    assert "data.split_seed=" in printed
    assert "p: paired t-test" in printed
    assert "Nadeau and Bengio, 2003" in printed
    assert "Welch" not in printed
    assert "warning" not in printed
    for seed in (1, 2):  # several seeds in a fold are averaged, and are not more samples
        run(f"b/again{seed}", seed, 0.51, fold(0) | FASTER)
    run("b/less", 3, 0.48, fold(0) | FASTER)  # the mean of 0.5, 0.51, 0.51 and 0.48 is 0.5
    assert line in compared("a", "b")[1]


def test_only_validation_metrics_are_corrected_for_the_overlap(run, compared):
    for number, difference in enumerate(DIFFERENCES):
        run(f"a/{number}", 0, 0.5 + difference, fold(number) | {"seconds": 10.0 + number})
        run(f"b/{number}", 0, 0.5, fold(number) | FASTER | {"seconds": 20.0 + number**2})
    _, printed, _ = compared("a", "b", "metric=test_accuracy")
    low, high, p = paired(DIFFERENCES, 0)
    assert f"{100 * low:+.2f} to {100 * high:+.2f}, paired over 5 folds, p = {p:.2g}" in printed
    assert "p: paired t-test, two-sided.\n" in printed
    _, printed, _ = compared("a", "b", "metric=seconds")
    _, _, p = welch([10.0 + number for number in range(5)], [20.0 + number**2 for number in range(5)])
    assert f"p = {p:.2g}: a is better" in printed
    assert "p: Welch's t-test, two-sided.\n" in printed


def test_the_better_group_is_that_of_the_folds_that_both_groups_have(run, compared):
    for number, accuracy in enumerate([0.5, 0.51, 0.52, 0.95, 0.96]):
        run(f"a/{number}", number, accuracy, fold(number))
        if number < 3:
            run(f"b/{number}", number, accuracy + 0.02 + number / 10_000, fold(number) | FASTER)
    line = r"a - b: -2\.01 points, .* paired over 3 folds, p = \S+: b is better"
    assert re.search(line, compared("a", "b")[1])  # although the mean of a is larger


def test_other_contents_of_the_files_are_other_settings(run):
    """The path of the file with the labels can be the same, and the number of images, too."""
    places = []
    for number in range(4):
        changes = fold(number % 2) | {"data.files_sha256": "0123456789abcdef"[number // 2 :]}
        places.append(str(run(f"{number}", 0, 0.9, changes)))
    groups, *_ = comparison.load(places, [], None)
    assert varied(groups) == ["images.files_sha256"]
    assert [len(group.by_fold) for group in groups] == [2, 2]


def test_repeated_folds_and_missing_folds(run, compared):
    for number in range(4):
        run(f"a/{number}", 0, 0.9 + number / 100, fold(number % 2, 2, number // 2))
        run(f"b/{number}", 0, 0.8 + number**2 / 1000, fold(number % 2, 2, number // 2) | FASTER)
    _, printed, _ = compared("a", "b")
    differences = [0.1 + number / 100 - number**2 / 1000 for number in range(4)]
    low, high, p = paired(differences, 1)  # half of the images for training, half for validation
    assert f"{100 * low:+.2f} to {100 * high:+.2f}, paired over 4 folds, p = {p:.2g}" in printed
    shutil.rmtree("a/0")
    mean = 100 * sum(differences[1:]) / 3
    assert re.search(rf"a - b: \+{mean:.2f} points, .* paired over 3 folds", compared("a", "b")[1])
    run("c/0", 0, 0.5, {"config.optimizer.lr": 0.5})
    run("c/1", 1, 0.6, {"config.optimizer.lr": 0.5})
    assert "at least 2 folds that both groups have are needed" in compared("a", "c")[1]
    assert "Welch" not in compared("a", "b", "c")[1]  # which was not applied


def test_against_names_the_baseline(run, compared):
    for seed in range(3):
        run(f"old/{seed}", seed, 0.90 + seed / 1000)
        run(f"new/{seed}", seed, 0.95 + seed / 1000)  # with the same settings, such as by other code
    _, printed, _ = compared("old", "--against", "new")
    assert re.search(r"a +quickstart .* 3 +old\n +b +quickstart \(baseline\) .* 3 +new", printed)
    assert "a - b: -5.00 points" in printed
    assert "b is better" in printed
    _, printed, _ = compared(".", "--against", "old")  # a run of the baseline belongs only to the baseline
    assert "a - b: +5.00 points" in printed
    status, _, error = compared("old", "--against", ".")
    assert status == 1
    assert "No run can be compared" in error


def test_several_comparisons_are_corrected_and_the_best_group_is_doubted(run, compared, tmp_path):
    for seed in range(3):
        for place, rate in enumerate([0.01, 0.02, 0.03]):
            accuracy = 0.9 + [0.0, 0.002, 0.0025][place] + seed / 1000
            run(f"sweep/{3 * place + seed}", seed, accuracy, {"config.optimizer.lr": rate})
    _, printed, _ = compared("sweep")
    pairs = re.findall(r"(a - \w): .* p = ([\d.]+)", printed)
    # errors 0.001 √(2/3), 4 degrees of freedom: t = 0.612 and 3.06 give 0.573 and 0.0376, the smaller one doubled
    assert pairs == [("a - b", "0.57"), ("a - c", "0.075")]
    # d = 0.0005/0.001 at the level 0.05/2: 2 (2.24 + 0.84)²/d² = 76, and one or two for Student's t (64 at 0.05)
    (seeds,) = re.findall(r"a - b.*\n.* about (\d+) seeds", printed)
    assert 76 < int(seeds) < 79
    assert "corrected for 2 comparisons by Holm's method" in printed
    assert "a was chosen as the best of 3 groups" in printed
    _, printed, _ = compared("sweep/6", "sweep/7", "sweep/8", "--against", *(f"sweep/{job}" for job in range(6)))
    assert re.findall(r"a - \w", printed) == ["a - b", "a - c"]
    assert "corrected for 2" in printed
    assert "best of" not in printed


def test_a_picture_of_the_user_is_kept(run, compared, tmp_path):
    run("a", 0, 0.9)
    (tmp_path / "comparison.png").write_text("mine")
    for number in (2, 3):
        status, printed, error = compared("a")
        assert (status, f"  comparison_{number}.png\n" in printed) == (0, True), error
        assert (tmp_path / f"comparison_{number}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.png").read_text() == "mine"
    assert compared("a", "output=comparison.png")[0] == 0
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_output_in_ascii(sweep, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "cifarnet.compare", "sweep"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "98.20 \\xb1 0.10%" in result.stdout


def test_records_that_cannot_be_read_are_left_out(run, compared, tmp_path):
    """A pipe would never end, and a number above 1e308 cannot be converted to a float."""
    run("a/0", 0, 0.9)
    run("huge", 1, 10**400)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/metrics.json")
    status, printed, error = compared("a", "huge", "pipe")
    assert status == 0, error
    assert "90.0%" in printed
    for name in ("huge", "pipe"):
        assert f"Left out: {name}/metrics.json cannot be read" in printed


def test_one_seed_has_no_interval(run, compared):
    run("a", 0, 0.9)
    run("b", 0, 0.8, FASTER)
    status, printed, _ = compared("a", "b/metrics.json")
    assert status == 0
    assert "a - b: +10.0 points; no interval: at least 2 seeds" in printed
    assert "nan" not in printed
    assert "±" not in printed


def test_interval_wider_than_the_range_of_accuracies(run, compared):
    """With 2 seeds each, Student's t at about 1 degree of freedom is 12.7."""
    for seed, (first, second) in enumerate([(0.5, 0.6), (0.8, 0.61)]):
        run(f"a/{seed}", seed, first)
        run(f"b/{seed}", seed, second, FASTER)
    _, printed, _ = compared("a", "b")
    low, high, p = welch([0.5, 0.8], [0.6, 0.61])
    assert (low < -1, high > 1, p > 0.05) == (True, True, True)
    assert f"points, 95% interval wider than -100 to +100: train more seeds or splits, p = {p:.2g}" in printed


def test_values_that_do_not_vary_have_no_interval(run, compared):
    for seed in range(2):
        run(f"a/{seed}", seed, 0.9)
        run(f"b/{seed}", seed, 0.8, FASTER)
    _, printed, _ = compared("a", "b")
    assert "+10.00 points; no interval: at least 2 seeds per group are needed, with different values" in printed
    assert "nan" not in printed


def test_one_group_has_a_mean(run, compared):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.8)
    _, printed, _ = compared("a")
    assert "85.00 ± 7.07%" in printed
    assert "only one group" in printed


def test_a_repeated_seed_counts_once(sweep, run, compared):
    run("again", 0, 0.5, {"finished": "2026-11-21"})  # older than the one in the sweep
    _, printed, _ = compared("sweep", "again", "sweep/0", "sweep")
    assert "98.20 ± 0.10%  3" in printed
    assert "each seed counts once: a leaves out again," in printed
    _, printed, _ = compared("sweep", "again", "metric=seconds")  # times of one seed do vary
    assert re.search(r"13.00 ± 0.00 +4 ", printed)


def test_different_circumstances_are_reported(run, compared):
    other = {"data.sha256": "beef" * 16, "versions.torch": "2.14.1", "git_commit": "d7600ac0-dirty", "tta": "mirror"}
    other["hardware.name"] = "Another processor"
    for seed in range(2):
        run(f"a/{seed}", seed, 0.9 + seed / 100)
        run(f"b/{seed}", seed, 0.8 + seed / 100, other)
    _, printed, _ = compared("a", "b", "metric=test_accuracy")
    assert "warning: images.sha256 differs: d01fbde4 (a); beefbeef (b)" in printed
    assert "warning: versions.torch differs: 2.15.0 (a); 2.14.1 (b)" in printed
    assert re.search(r"warning: git_commit differs: a020c70c\w+ \(a\); d7600ac0-dirty \(b\)", printed)
    assert "uncommitted changes" in printed
    assert "warning: tta differs: none (a); mirror (b)" in printed
    assert "hardware" not in printed
    _, printed, _ = compared("a", "b", "metric=images_per_second")
    assert "warning: hardware.name differs: A processor (a); Another processor (b)" in printed
    assert "tta" not in printed


def test_lower_is_better_for_losses_and_times(run, compared):
    for seed in range(3):
        run(f"a/{seed}", seed, 0.9, {"test_cross_entropy": 0.03 + seed / 1e4})
        run(f"b/{seed}", seed, 0.9, {"test_cross_entropy": 0.02 + seed / 1e4} | FASTER)
    _, printed, _ = compared("a", "b", "metric=test_cross_entropy")
    assert re.search(r"a +quickstart +0.0201 ± 0.0001 +3 +0.02\b", printed)
    assert "a - b: -0.0100" in printed
    assert "a is better" in printed


@pytest.mark.parametrize(
    ("change", "varying"),
    [
        ({"config.name": "other"}, None),
        ({"config.data.root": "/elsewhere"}, None),
        ({"config.threads": 1}, None),
        ({"config.callbacks.progress": None}, None),
        ({"config.ckpt_path": "x/last.ckpt"}, None),
        ({"config.optimizer.lr": 0.010, "config.model.hidden": 512.0}, None),
        ({"config.data.train_sizes": [24, 32]}, "data.train_sizes"),
        ({"config.data.split_seed": 1}, "data.split_seed"),
        ({"config.scheduler.max_lr": 0.02}, "scheduler.max_lr"),
        ({"config.model": {"_target_": "mine.Net", "depth": 3}}, "model"),
        ({"config.model.depth": 3}, "model.depth"),
        ({"config.optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001}}, "optimizer  optimizer.lr"),
        ({"config.callbacks.freeze": {"_target_": "mine.Freeze", "epoch": 2}}, "callbacks.freeze"),
    ],
    ids=str,
)
def test_which_settings_make_another_recipe(run, change, varying):
    places = [str(run(f"{seed}", seed, 0.9, change if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    assert len(groups) == (2 if varying else 1)
    assert "  ".join(key.removesuffix("._target_") for key in varied(groups)) == (varying or "")


def test_threads_distinguish_recipes_only_for_times(run):
    places = [str(run(f"{seed}", seed, 0.9, {"config.threads": 1 + seed % 2})) for seed in range(4)]
    assert len(comparison.load(places, [], None)[0]) == 1
    assert varied(comparison.load(places, [], "seconds")[0]) == ["threads"]


def test_a_fixed_shuffle_seed_is_another_recipe(run):
    fixed = {"config.data.shuffle_seed": 0}
    places = [str(run(f"fixed{seed}", seed, 0.9, fixed)) for seed in range(3)]
    places += [str(run(f"follows{seed}", seed, 0.8)) for seed in range(1, 4)]
    groups, *_ = comparison.load(places, [], None)
    assert [len(group.runs) for group in groups] == [3, 3]
    assert [group.settings["data.shuffle_seed"] for group in groups] == ["0", "${seed}"]
    assert " ${seed}\n" in comparison.table(groups) + "\n"


def test_many_differences_are_listed_below(run):
    change = {f"config.model.{letter}": 1 for letter in "pqrst"}
    places = [str(run(f"{seed}", seed, 0.9 - seed % 2 / 100, change if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    lines = comparison.table(groups).splitlines()
    assert lines[0].split() == ["val", "accuracy", "n"]
    assert lines[4:6] == ["  different in a / b:", "    model.p: none / 1"]


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={path.stem}"
        for group in ("optimizer", "scheduler")
        for path in sorted((CONFIGS / group).glob("*.yaml"))
    ]
    + ["callbacks=lean", "data=synthetic", "+experiment=speedrun"],
)
def test_seeds_are_one_group_and_a_rate_is_the_only_difference(run, choice):
    """Settings that follow the seed or the optimizer's rate are recorded as `${…}`."""
    places = []
    for number, overrides in enumerate(
        [["seed=0"], ["seed=1"], ["optimizer.lr=0.123"], ["optimizer.lr=0.123", "seed=1"]]
    ):
        config = OmegaConf.to_container(compose("train", [choice, *overrides]), resolve=False)
        config |= {"output_dir": "${hydra:runtime.output_dir}"}
        places.append(str(run(str(number), number % 2, 0.9, {"config": config})))
    groups, *_ = comparison.load(places, [], None)
    assert [len(group.values) for group in groups] == [2, 2]
    assert varied(groups) == ["optimizer.lr"]


@pytest.mark.parametrize("sessions", [None, [session(), session(precision="bf16-mixed")]])
def test_the_precision_that_was_used_distinguishes_recipes(run, sessions):
    """The setting may be `auto`, and a run may have been resumed with another precision."""
    change = {"sessions": sessions} if sessions else {"precision": "bf16-mixed"}
    places = [str(run(f"{seed}", seed, 0.9, change if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    assert varied(groups) == ["trainer.precision"]
    assert groups[1].settings["trainer.precision"] == ("32-true / bf16-mixed" if sessions else "bf16-mixed")


def test_circumstances_of_each_session_are_compared(run, compared):
    second = session(versions={"torch": "2.16.0"}, git_commit="d7600ac0-dirty")
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.8, {"sessions": [session(), second]})
    _, printed, _ = compared("a")
    assert "warning: versions.torch differs: 2.15.0 (a); 2.16.0 (a)" in printed
    assert "-dirty" in printed


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["nowhere"], "nowhere does not exist", "Specify the folder of a run"),
        (["empty"], "empty contains no finished run", "Specify the folder of a run"),
        (["evaluated"], "evaluated contains no finished run", "Specify the folder of a run"),
        (["broken"], "broken/metrics.json cannot be read: Expecting value", "Choose other runs"),
        (["a=1", "metric=accuracy"], "metric=accuracy is not valid", "test_accuracy"),
        (["a=1", "metric=tta"], "metric=tta is not valid", "test_accuracy"),
        (["a=1", "metric="], "metric= is not valid", "test_accuracy"),
        (["a=1", "+metrics=seconds"], "metrics: unknown setting", "Did you mean metric?"),
        (["a" * 300], "a…: the name of this file or folder is too long", "Choose a shorter path"),
        (["a=1", "--against", "blind", "metric=val_accuracy"], "Left out: blind has no val_accuracy", "metric"),
        (["a=1", "--against", "a=1"], "No run can be compared", "--against"),
        (["a=1", "metric=3"], "metric=3 is not valid", "expected"),
        (["a=1", "metrik=seconds"], "metrik", "Did you mean metric?"),
        (["a=1", "output=picture.jpx"], "output=picture.jpx cannot be written", "png"),
        (["a=1", "output=broken/metrics.json/x.png"], "metrics.json/x.png cannot be written", "metrics.json"),
        (["a=1", "output=pipe"], "pipe cannot be written: it is not a regular file", "Choose another path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_an_error(run, compared, tmp_path, arguments, problem, remedy):
    run("a=1", 0, 0.9)  # a path is not mistaken for an override
    run("blind", 0, 0.9, {"val_accuracy": None})
    for folder in ("empty", "broken", "evaluated/evaluation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "broken/metrics.json").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("metrics.json", "report.html"):
        (tmp_path / "evaluated/evaluation" / name).touch()
    status, _, error = compared(*arguments)
    assert status == 1
    assert problem in error
    assert remedy in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.tmp"))


def test_an_evaluation_in_the_folder_of_a_run_is_ignored(run, compared):
    evaluation = run("a", 0, 0.9) / "evaluation"
    evaluation.mkdir()
    for name in ("metrics.json", "report.html"):
        (evaluation / name).touch()
    _, printed, _ = compared("a")
    assert re.search(r"a +quickstart +90.0% +1\b", printed)
    assert "Left out" not in printed


def test_runs_without_the_metric_are_left_out_with_a_warning(run, compared):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.9, {"val_accuracy": None})
    _, printed, _ = compared("a", "metric=val_accuracy")
    assert "warning: Left out: a/1 has no val_accuracy" in printed


def test_validation_accuracy_is_the_metric_if_all_runs_have_it(run, compared):
    run("a", 0, 0.9, {"test_accuracy": 0.5})
    run("b", 0, 0.8, {"test_accuracy": 0.6} | FASTER)
    _, printed, _ = compared("a", "b")
    assert re.search(r"val accuracy .*\n +a +quickstart +90.0% +1 +0.01\b", printed)
    run("c", 0, 0.7, {"val_accuracy": None, "config.optimizer.lr": 0.03})
    _, printed, _ = compared("a", "b", "--against", "c")
    assert re.search(r"test accuracy .*\n +a +quickstart +60.00% +1 +0.02\b", printed)
    assert "Left out" not in printed


def test_an_unreadable_record_is_reported_and_the_others_are_compared(run, compared):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.9)
    run("a/bad", 2, 0.9, {"data": None})
    status, printed, error = compared("a")
    assert status == 0, error
    assert re.search(r"a +quickstart +90.00 ± 0.00% +2\b", printed)
    [line] = [line for line in printed.splitlines() if "Left out" in line]
    assert "a/bad/metrics.json cannot be read" in line
    status, _, error = compared("a/bad")
    assert status == 1
    assert "a/bad/metrics.json cannot be read" in error
    assert "Traceback" not in error


def test_a_partial_run_is_left_out(command, run, compared, tmp_path):
    tiny = [*SMALL, "trainer.max_epochs=1", "scheduler=constant", "callbacks=lean", "~logger"]
    for name, settings in [
        ("dev", ["+trainer.fast_dev_run=true"]),
        ("few", ["+trainer.limit_train_batches=1"]),
        ("all", []),
    ]:
        status, _, error = command(*tiny, *settings, f"hydra.run.dir=runs/{name}")
        assert status == 0, error
    status, printed, error = compared("runs")
    assert status == 0, error
    assert "warning: Left out: runs/dev is a partial run (fast_dev_run=True)" in printed
    assert "warning: Left out: runs/few is a partial run (limit_train_batches=1)" in printed
    assert re.search(r"a +train +[\d.]+% +1\b", printed)
    assert json.loads((tmp_path / "runs/all/metrics.json").read_text())["partial"] is None


def test_the_axis_of_accuracies_ends_at_100_percent(run):
    for seed, (sure, unsure) in enumerate([(0.99, 0.1), (1.0, 0.6)]):
        run(f"runs/a{seed}", seed, sure)
        folder = run(f"runs/b{seed}", seed, unsure, {"config.optimizer.lr": 0.02}).parent
    groups, *_ = comparison.load([str(folder)], [], "test_accuracy")
    [axis] = figures.comparison(groups).axes
    low, high = axis.get_ylim()
    assert (low, high) == (0, 1)
    ends = [y for bars in axis.collections for segment in bars.get_segments() for _, y in segment]
    assert len(ends) == 4
    assert max(ends) > 1


def test_letters():
    assert [tables.letter(number) for number in (0, 25, 26, 27 * 26)] == ["a", "z", "aa", "aaa"]


@pytest.mark.parametrize(
    ("argument", "modules", "printed"),
    [("--help", {"torch", "scipy", "matplotlib"}, "metric: null"), ("sweep", {"torch"}, "a is better")],
)
def test_needs_no_torch(sweep, tmp_path, argument, modules, printed):
    program = "import sys\nfrom cifarnet.compare import main\ntry: main()\n"
    program += f"finally: assert not {modules} & sys.modules.keys()"
    command = [sys.executable, "-c", program, argument]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout


def test_real_runs_of_two_rates(command, compared, tmp_path):
    tiny = [*SMALL, "trainer.max_epochs=1", "callbacks.pictures=null", "~logger", "scheduler=constant"]
    status, _, error = command("-m", *tiny, "optimizer.lr=0.01,0.02", "seed=0,1", "hydra.sweep.dir=sweep")
    assert status == 0, error
    status, printed, error = compared("sweep", "metric=test_cross_entropy", "output=losses.svg")
    assert status == 0, error
    groups, *_ = comparison.load(["sweep"], [], "test_cross_entropy")
    assert [len(group.values) for group in groups] == [2, 2]
    assert varied(groups) == ["optimizer.lr"]
    assert "p = " in printed
    assert "<svg" in (tmp_path / "losses.svg").read_text()
