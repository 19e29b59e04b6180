import json
import math
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cifarnet.cli import CONFIGS, compose
from cifarnet.compare import main
from cifarnet.records import comparison
from cifarnet.records.tables import varied
from conftest import SMALL

METRICS = {
    "name": "quickstart",
    "tested_epoch": 4,
    "test_cross_entropy": 0.02,
    "tta": "none",
    "seconds": 13.0,
    "images_per_second": 2700.0,
    "data": {"source": "Synthetic", "classes": 10, "train": 9000, "val": 1000, "test": 2000, "sha256": "d01fbde4" * 8},
    "hardware": {"device": "cpu", "name": "A processor", "threads": 2, "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.15.0"},
    "git_commit": "a020c70c05f7975ba2ad323737012e0cef72fd69",
    "config": {
        "data": {"_target_": "cifarnet.data.Synthetic", "root": "data", "split_seed": 0, "shuffle_seed": "${seed}"},
        "model": {"_target_": "cifarnet.models.CNN", "widths": [32, 64], "hidden": 512},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01},
        "scheduler": {"max_lr": "${optimizer.lr}"},
        "module": {"seed": "${seed}"},
        "callbacks": {
            "progress": {"_target_": "cifarnet.callbacks.history.ProgressBar"},
            "best": {"dirpath": "${output_dir}/checkpoints", "monitor": "val/accuracy"},
        },
        "trainer": {"precision": "auto"},
        "threads": None,
    },
    "precision": "32-true",
    "history": [],
}


@pytest.fixture
def run(tmp_path):
    """Write a run's folder: run("a/0", seed, test accuracy, {"config.optimizer.lr": 0.02, "tta": "mirror"})."""

    def write(folder: str, seed: int, accuracy: float, changes: dict | None = None) -> Path:
        place = tmp_path / folder
        metrics = deepcopy(METRICS) | {"seed": seed, "finished": f"2026-11-22T15:{seed!s:0>2}"}
        metrics |= {"val_accuracy": accuracy, "test_accuracy": accuracy}
        metrics["config"] |= {"seed": seed, "name": "quickstart", "output_dir": str(place)}
        for key, value in (changes or {}).items():
            *sections, last = key.split(".")
            node = metrics
            for section in sections:
                node = node[section]
            node[last] = value
        metrics["resolved"] = OmegaConf.to_container(OmegaConf.create(metrics["config"]), resolve=True)
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps(metrics))
        return place

    return write


@pytest.fixture
def compared(command):
    """Run `python -m cifarnet.compare …` in this process: exit status, what was printed, and to stderr."""
    return lambda *arguments: command(*arguments, main=main)


FASTER = {"config.optimizer.lr": 0.02}


@pytest.fixture
def sweep(run):
    """Two rates of three seeds, far apart."""
    for seed, accuracy in enumerate([0.981, 0.982, 0.983]):
        run(f"sweep/{seed}", seed, accuracy)
        run(f"sweep/{seed + 3}", seed, accuracy - 0.02, FASTER)


def test_groups_by_seed_and_names_what_differs(sweep, compared, tmp_path):
    status, printed, error = compared("sweep")
    assert status == 0, error
    lines = [line.split() for line in printed.splitlines() if line]
    assert lines[0] == ["val", "accuracy", "n", "optimizer.lr"]  # max_lr follows
    assert lines[1] == ["a", "quickstart", "98.20", "±", "0.10", "%", "3", "0.01"]
    assert lines[2] == ["b", "quickstart", "96.20", "±", "0.10", "%", "3", "0.02"]
    # error √(0.001²/3 + 0.001²/3) = 0.000816; 4 degrees of freedom: t = 2.776; 2 ± 0.23 points
    assert "a - b: +2.00 points, 95 % interval +1.77 to +2.23, p < 0.0001: a is better" in printed
    assert "warning" not in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_names_in_a_record_do_not_command_the_terminal(run, compared):
    run("a/0", 0, 0.9, {"config.name": "a\x1b[2J", "config.optimizer.lr": "\x1b]0;x"})
    run("b/0", 0, 0.8)
    status, printed, error = compared("a", "b")
    assert status == 0, error
    assert "\\x1b]0;x" in printed
    assert "\x1b" not in printed


def test_a_difference_within_luck(run, compared):
    for seed, accuracy in enumerate([0.90, 0.91, 0.92, 0.93]):
        run(f"a/{seed}", seed, accuracy)
        run(f"b/{seed}", seed, accuracy + 0.01, FASTER)
    _, printed, _ = compared("a", "b")
    assert "not distinguishable" in printed
    assert "is better" not in printed
    # d = 0.01/0.0129 = 0.775: 28 each (for d = 0.8, Cohen has 26)
    assert "about 24 more seeds each would be needed to tell a difference of this size" in printed


def test_against_decides_the_side(run, compared):
    for seed in range(3):
        run(f"old/{seed}", seed, 0.90 + seed / 1000)
        run(f"new/{seed}", seed, 0.95 + seed / 1000)  # same settings: the code is what differs
    _, printed, _ = compared("old", "--against", "new")
    assert re.search(r"a +quickstart .* 3 +old\n +b +quickstart \(baseline\) .* 3 +new", printed)
    assert "a - b: -5.00 points" in printed
    assert "b is better" in printed
    _, printed, _ = compared(".", "--against", "old")  # what is in the baseline counts there alone
    assert "a - b: +5.00 points" in printed
    status, _, error = compared("old", "--against", ".")
    assert status == 1
    assert "holds no run that --against . does not" in error


def test_several_groups_are_corrected_and_the_best_is_doubted(run, compared, tmp_path):
    for seed in range(3):
        for place, rate in enumerate([0.01, 0.02, 0.03]):
            accuracy = 0.9 + [0.0, 0.002, 0.0025][place] + seed / 1000
            run(f"sweep/{3 * place + seed}", seed, accuracy, {"config.optimizer.lr": rate})
    _, printed, _ = compared("sweep")
    pairs = re.findall(r"(a - \w): .* p = ([\d.]+)", printed)
    # errors 0.001 √(2/3), 4 degrees of freedom: t = 0.612 and 3.06 give 0.573 and 0.0376, the smaller one doubled
    assert pairs == [("a - b", "0.57"), ("a - c", "0.075")]
    assert "corrected for 2 comparisons by Holm's method" in printed
    assert "a is the best of 3 by these very figures" in printed
    _, printed, _ = compared("sweep/6", "sweep/7", "sweep/8", "--against", *(f"sweep/{job}" for job in range(6)))
    assert "1 of the runs' groups are compared with 2 to compare against" in printed
    assert "corrected for 2" in printed
    assert "best of" not in printed


def test_one_seed_has_no_interval(run, compared):
    run("a", 0, 0.9)
    run("b", 0, 0.8, FASTER)
    status, printed, _ = compared("a", "b/metrics.json")
    assert status == 0
    assert "a - b: +10.00 points; no interval: at least 2 seeds of each are needed" in printed
    assert "warning: a has one seed" in printed
    assert "nan" not in printed
    assert "±" not in printed


def test_no_variation_is_told(run, compared):
    for seed in range(2):
        run(f"a/{seed}", seed, 0.9)
        run(f"b/{seed}", seed, 0.8, FASTER)
    _, printed, _ = compared("a", "b")
    assert "+10.00 points; no interval: neither group's values vary" in printed
    assert "nan" not in printed


def test_one_group_is_summed_up(run, compared):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.8)
    _, printed, _ = compared("a")
    assert "85.00 ± 7.07 %" in printed
    assert "One group: nothing to compare it with." in printed


def test_a_repeated_seed_counts_once(sweep, run, compared):
    run("again", 0, 0.5, {"finished": "2026-11-21"})  # older than the one in the sweep
    _, printed, _ = compared("sweep", "again", "sweep/0", "sweep")
    assert "98.20 ± 0.10 %  3" in printed
    assert "a seed counts once: of a, again is no further sample" in printed
    _, printed, _ = compared("sweep", "again", "metric=seconds")  # times of one seed do vary
    assert re.search(r"13.00 ± 0.00 s +4 ", printed)


def test_unlike_circumstances_are_told(run, compared):
    other = {"data.sha256": "beef" * 16, "versions.torch": "2.14.1", "git_commit": "d7600ac0-dirty", "tta": "mirror"}
    other["hardware.name"] = "Another processor"
    for seed in range(2):
        run(f"a/{seed}", seed, 0.9 + seed / 100)
        run(f"b/{seed}", seed, 0.8 + seed / 100, other)
    _, printed, _ = compared("a", "b", "metric=test_accuracy")
    images = "9,000 / 1,000 / 2,000 images to train / validate / test, 10 classes, checksum"
    assert f"warning: the data differ: {images} d01fbde4 (a); {images} beefbeef (b)" in printed
    assert "warning: PyTorch differs: 2.15.0 (a); 2.14.1 (b)" in printed
    assert "warning: the code differs: a020c70c (a); d7600ac0 (b)" in printed
    assert "-dirty" in printed
    assert "test-time augmentation differs (test_accuracy_one_view is without): none (a); mirror (b)" in printed
    assert "hardware" not in printed
    _, printed, _ = compared("a", "b", "metric=images_per_second")
    assert "the hardware differs: A processor, 2 threads, Linux (a); Another processor, 2 threads, Linux (b)" in printed
    assert "augmentation" not in printed


def test_lower_is_better_for_losses_and_times(run, compared):
    for seed in range(3):
        run(f"a/{seed}", seed, 0.9, {"test_cross_entropy": 0.03 + seed / 1e4})
        run(f"b/{seed}", seed, 0.9, {"test_cross_entropy": 0.02 + seed / 1e4} | FASTER)
    _, printed, _ = compared("a", "b", "metric=test_cross_entropy")
    assert re.search(r"a +quickstart +0.02010 ± 0.00010 +3 +0.02\b", printed)
    assert "a - b: -0.01000" in printed
    assert "a is better" in printed


@pytest.mark.parametrize(
    ("change", "named"),
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
def test_which_settings_make_another_recipe(run, change, named):
    places = [str(run(f"{seed}", seed, 0.9, change if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    assert len(groups) == (2 if named else 1)
    assert "  ".join(key.removesuffix("._target_") for key in varied(groups)) == (named or "")


def test_threads_are_no_other_recipe_but_for_times(run):
    places = [str(run(f"{seed}", seed, 0.9, {"config.threads": 1 + seed % 2})) for seed in range(4)]
    assert len(comparison.load(places, [], None)[0]) == 1
    assert varied(comparison.load(places, [], "seconds")[0]) == ["threads"]


def test_a_fixed_order_is_another_recipe(run):
    fixed = {"config.data.shuffle_seed": 0}
    places = [str(run(f"fixed{seed}", seed, 0.9, fixed)) for seed in range(3)]
    places += [str(run(f"follows{seed}", seed, 0.8)) for seed in range(1, 4)]
    groups, *_ = comparison.load(places, [], None)
    assert [len(group.runs) for group in groups] == [3, 3]
    assert [group.settings["data.shuffle_seed"] for group in groups] == ["0", "${seed}"]
    assert " = seed\n" in comparison.table(groups, comparison.Metric("test_accuracy", groups)) + "\n"


def test_many_differences_are_listed_below(run):
    change = {f"config.model.{letter}": 1 for letter in "pqrst"}
    places = [str(run(f"{seed}", seed, 0.9 - seed % 2 / 100, change if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    lines = comparison.table(groups, comparison.Metric("test_accuracy", groups)).splitlines()
    assert lines[0].split() == ["test", "accuracy", "n"]
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
def test_seeds_of_a_recipe_are_one_group_and_a_rate_is_told_alone(run, choice):
    """What follows seed or the optimizer's rate in configs/ is as it was written: `${…}`."""
    places = []
    for number, overrides in enumerate(
        [["seed=0"], ["seed=1"], ["optimizer.lr=0.123"], ["optimizer.lr=0.123", "seed=1"]]
    ):
        config = OmegaConf.to_container(compose("train", [choice, *overrides]), resolve=False)
        metrics = {"config": config | {"output_dir": "${hydra:runtime.output_dir}"}, "resolved": config}
        place = run(str(number), number % 2, 0.9)
        record = json.loads((place / "metrics.json").read_text()) | metrics
        (place / "metrics.json").write_text(json.dumps(record))
        places.append(str(place))
    groups, *_ = comparison.load(places, [], None)
    assert [len(group.values) for group in groups] == [2, 2]
    assert varied(groups) == ["optimizer.lr"]


@pytest.mark.parametrize("sessions", [None, [{"precision": "32-true"}, {"precision": "bf16-mixed"}]])
def test_the_precision_that_was_used_decides(run, sessions):
    """Not the one written, which may be `auto`; of each stretch, where a run was resumed elsewhere."""
    other = {"sessions": sessions} if sessions else {"precision": "bf16-mixed"}
    places = [str(run(f"{seed}", seed, 0.9, other if seed % 2 else {})) for seed in range(4)]
    groups, *_ = comparison.load(places, [], None)
    assert varied(groups) == ["trainer.precision"]
    assert groups[1].settings["trainer.precision"] == ("32-true / bf16-mixed" if sessions else "bf16-mixed")


def test_where_each_stretch_of_a_run_ran_is_told(run, compared):
    sessions = [{"versions": {"torch": "2.15.0"}}, {"versions": {"torch": "2.16.0"}, "git_commit": "d7600ac0-dirty"}]
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.8, {"sessions": sessions})
    _, printed, _ = compared("a")
    assert "warning: PyTorch differs: 2.15.0 (a); 2.16.0 (a)" in printed
    assert "-dirty" in printed


def old(place: Path) -> None:
    """Turn a record into one of version 0.1, whose config was resolved."""
    metrics = json.loads((place / "metrics.json").read_text())
    metrics["config"] = metrics.pop("resolved")
    (place / "metrics.json").write_text(json.dumps(metrics))


def test_records_of_version_0_1_are_told_in_one_message(run, compared):
    for seed in range(3):
        old(run(f"old/{seed}", seed, 0.9))
        run(f"new/{seed}", seed, 0.9)
    for arguments in (["old"], ["new", "--against", "old"]):
        status, _, error = compared(*arguments)
        assert status == 1
        assert "old/0 and 2 more: left out, recorded by an older version of cifarnet, whose settings cannot" in error
    status, printed, _ = compared("old", "new")
    assert status == 0
    assert printed.count("warning: old/0 and 2 more: left out, recorded by an older version") == 1
    assert re.search(r"a +quickstart +90.00 ± 0.00 % +3\b", printed)


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["nowhere"], "nowhere: no such file or folder", "folder above runs"),
        (["empty"], "empty holds no finished run", "Name a run's folder"),
        (["evaluated"], "evaluated holds no finished run", "Name a run's folder"),
        (["broken"], "broken/metrics.json cannot be read: Expecting value", "Name a run's folder"),
        (["a=1", "metric=accuracy"], "metric=accuracy: a=1/metrics.json has no such number", "test_accuracy"),
        (["a=1", "metric=tta"], "metric=tta: a=1/metrics.json has no such number", "test_accuracy"),
        (["a=1", "--against", "blind", "metric=val_accuracy"], "blind/metrics.json", "null"),
        (["a=1", "metric=3"], "metric=3 has the wrong type", "expected"),
        (["a=1", "metrik=seconds"], "metrik is no setting", "Did you mean metric?"),
        (["a=1", "output=picture.jpx"], "output=picture.jpx cannot be written", "png"),
        (["a=1", "output=broken/metrics.json/x.png"], "metrics.json/x.png cannot be written", "metrics.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_told_in_one_message(run, compared, tmp_path, arguments, named, remedy):
    run("a=1", 0, 0.9)  # a path is no override
    run("blind", 0, 0.9, {"val_accuracy": None})
    (tmp_path / "empty").mkdir()
    for folder, content in [
        ("broken", ""),
        ("evaluated/evaluation", '{"test_accuracy": 0.9, "seed": 0, "config": {}}'),
    ]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.json").write_text(content)
    status, _, error = compared(*arguments)
    assert status == 1
    assert named in error
    assert remedy in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.tmp"))


def test_an_evaluation_in_a_runs_folder_is_no_run(run, compared):
    place = run("a", 0, 0.9) / "evaluation"
    place.mkdir()
    (place / "metrics.json").write_text('{"test_accuracy": 0.1, "seed": 0, "config": {}}')
    _, printed, _ = compared("a")
    assert re.search(r"a +quickstart +90.00 % +1\b", printed)


def test_runs_without_the_metric_are_left_out_aloud(run, compared):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.9, {"val_accuracy": None})
    _, printed, _ = compared("a", "metric=val_accuracy")
    assert "warning: a/1 is left out: its val_accuracy is no number." in printed


def test_validation_ranks_where_all_runs_have_it(run, compared):
    run("a", 0, 0.9, {"test_accuracy": 0.5})
    run("b", 0, 0.8, {"test_accuracy": 0.6} | FASTER)
    _, printed, _ = compared("a", "b")
    assert re.search(r"val accuracy .*\n +a +quickstart +90.00 % +1 +0.01\b", printed)
    run("c", 0, 0.7, {"val_accuracy": None, "config.optimizer.lr": 0.03})
    _, printed, _ = compared("a", "b", "--against", "c")
    assert re.search(r"test accuracy .*\n +a +quickstart +60.00 % +1 +0.02\b", printed)
    assert "left out" not in printed


DAMAGED = {
    "empty": "",
    "binary": "\udcff\udcfe",
    "cut": '{"val_accuracy": 0.',
    "deep": '{"config": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"val_accuracy": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("versions", "hardware", "tta", "data", "config", "precision", "resolved")),
        *({key: []} for key in ("versions", "hardware", "tta", "data.sha256", "data.train", "git_commit")),
        {"sessions": [1]},
        {"sessions": [{"versions": None}]},
        {"config.callbacks": [1]},
        *DAMAGED,
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_damaged_record_is_named_and_the_others_are_compared(run, compared, change, tmp_path):
    run("a/0", 0, 0.9)
    run("a/1", 1, 0.9)
    bad = run("a/bad", 2, 0.9) / "metrics.json"
    if isinstance(change, str):
        bad.write_text(DAMAGED[change], "utf-8", "surrogateescape")
    else:
        metrics = json.loads(bad.read_text())
        for key, value in change.items():
            section, _, last = key.rpartition(".")
            (metrics[section] if section else metrics)[last] = value
        bad.write_text(json.dumps(metrics))
    status, printed, error = compared("a")
    assert status == 0, error
    assert re.search(r"a +quickstart +90.00 ± 0.00 % +2\b", printed)
    [line] = [line for line in printed.splitlines() if "left out" in line]
    assert "a/bad/metrics.json" in line
    status, _, error = compared("a/bad")
    assert status == 1
    assert "a/bad/metrics.json" in error
    assert "Traceback" not in error


def test_a_config_that_is_too_deep_is_damage():
    deep: dict = {}
    for _ in range(2000):
        deep = {"a": deep}
    record = deepcopy(METRICS) | {"resolved": METRICS["config"]}
    assert comparison._damage(record) is None
    assert comparison._damage(record | {"config": deep}) == "its config is nested too deeply"


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, [0.9], "0.9", True], ids=lambda value: str(value)[:5])
def test_what_is_no_number_is_left_out(run, compared, value):
    run("a/0", 0, 0.9)
    run("a/bad", [2], 0.9, {"val_accuracy": value, "finished": None, "name": 3, "config.callbacks": {"x": "y"}})
    status, printed, error = compared("a", "metric=val_accuracy")
    assert status == 0, error
    assert "warning: a/bad is left out: its val_accuracy is no number." in printed
    status, printed, _ = compared("a", "metric=test_accuracy")
    assert status == 0


def test_a_trial_run_is_left_out(command, run, compared, tmp_path):
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
    assert "warning: runs/dev: left out, a trial run (fast_dev_run=True)." in printed
    assert "warning: runs/few: left out, a trial run (limit_train_batches=1)." in printed
    assert re.search(r"a +train +[\d.]+ % +1\b", printed)
    assert json.loads((tmp_path / "runs/all/metrics.json").read_text())["partial"] is None


def test_axis_of_accuracies_ends_at_100_percent(run):
    for seed, (sure, unsure) in enumerate([(0.99, 0.1), (1.0, 0.6)]):
        run(f"runs/a{seed}", seed, sure)
        folder = run(f"runs/b{seed}", seed, unsure, {"config.optimizer.lr": 0.02}).parent
    groups, *_ = comparison.load([str(folder)], [], "test_accuracy")
    [axis] = comparison.draw(groups, "test_accuracy").axes
    low, high = axis.get_xlim()
    assert low >= 0
    assert high == 1
    ends = [x for bars in axis.collections for segment in bars.get_segments() for x, _ in segment]
    assert len(ends) == 4
    assert all(0 <= x <= 1 for x in ends)


def test_letters():
    assert [comparison.letter(number) for number in (0, 25, 26, 27 * 26)] == ["a", "z", "aa", "aaa"]


@pytest.mark.parametrize(
    ("argument", "unneeded", "printed"),
    [("--help", {"torch", "scipy", "matplotlib"}, "metric: null"), ("sweep", {"torch"}, "a is better")],
)
def test_needs_no_torch(sweep, tmp_path, argument, unneeded, printed):
    program = "import sys\nfrom cifarnet.compare import main\ntry: main()\n"
    program += f"finally: assert not {unneeded} & sys.modules.keys()"
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
