"""benchmarks/ladder.py: the table, and continuing after a kill."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cifarnet
from cifarnet.train import train
from conftest import LEARNS
from example_record import RECORD, session

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["data=synthetic", "data.train_size=400", "data.test_size=50", "trainer=cpu", "threads=1"]


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """The module, which writes to a temporary folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ladder
    import ladder_pages

    for folder in ("docs/images", "configs/experiment", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    for page in ("docs/zoo.md", "README.md", "benchmarks/README.md"):
        (tmp_path / page).write_text(f"above\n{ladder_pages.BEGIN}\nold\n{ladder_pages.END}\nbelow\n")
    for name in ("a", "b", "quickstart"):
        header = f"# @package _global_\n# python -m cifarnet.train +experiment={name}\n# Network {name},\n# small. B.\n"
        (tmp_path / f"configs/experiment/{name}.yaml").write_text(f"{header}# Result: old\ndefaults: []\n")
    monkeypatch.setattr(ladder, "recipe", lambda settings: "now")
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "ladder.json")
    return ladder


def result(command, seed, accuracy, **more):
    run = {
        "command": command,
        "recipe": "now",
        "seed": seed,
        "test_accuracy": accuracy,
        "test_accuracy_one_view": accuracy - 0.01,
    }
    run |= {"tta": "none", "parameters": 1234567, "gflop": 0.0531, "epochs": 20, "seconds": 100.4, "threads": 2}
    run |= {"images_per_second": 3000, "precision": "bf16-mixed", "git_commit": "0123456789-dirty", "sha256": "0"}
    return run | {"hardware": "A chip", "images": "CIFAR10", "torch": "2.14.1", "date": "2026-01-02"} | more


def test_the_table_shows_the_results(ladder):
    runs = [result("+experiment=b", 0, 0.9, tta="mirror", seconds=50), result("+experiment=a", 0, 0.84)]
    runs += [result("+experiment=a", 1, 0.86, seconds=200), result("+experiment=a", 0, 0.5, hardware="Another")]
    runs += [result("+experiment=a", 2, 0.1, recipe="before")]
    ladder.write(runs)
    lines = (ladder.ROOT / "docs/zoo.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `+")]
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert rows[0] == (
        "| `+experiment=b` | 1,234,567 | 0.0531 | 20 | 90.00% (1; 89.00 without mirror) | 50 | 3,000 | CIFAR10 | "
        "A chip, 2 threads, bf16-mixed, torch 2.14.1 | 0123456-dirty, 2026-01-02 |"
    )
    assert "| 85.00 ± 1.41% (2) | 150 |" in rows[1]
    assert "Another" in rows[2]
    assert (ladder.ROOT / "docs/images/ladder.png").stat().st_size > 1000
    lines = (ladder.ROOT / "README.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "| `a`: Network a, small | 85.00 ± 1.41% (2) | 150 | A chip, 2 threads |" in lines
    file = (ladder.ROOT / "configs/experiment/a.yaml").read_text()
    machine = "A chip, 2 threads, bf16-mixed, torch 2.14.1"
    assert f"# small. B.\n# Result: 85.00 ± 1.41% (2) on {machine}, 150 s per run (docs/zoo.md)\ndefaults" in file


def test_the_pages_agree_with_the_recorded_results(monkeypatch, tmp_path):
    """The pages and the experiments' files are as `python benchmarks/ladder.py --write` writes them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ladder

    root = BENCHMARKS.parent
    pages = [Path("README.md"), Path("docs/zoo.md"), Path("benchmarks/README.md")]
    pages += [file.relative_to(root) for file in (root / "configs/experiment").glob("*.yaml")]
    (tmp_path / "docs/images").mkdir(parents=True)
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / page, tmp_path / page)
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    ladder.write(json.loads(ladder.RESULTS.read_text("utf-8")))
    for page in pages:
        assert (tmp_path / page).read_text("utf-8") == (root / page).read_text("utf-8")


def test_the_estimate_of_a_large_sweep_agrees_with_the_recorded_seconds(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ladder

    pages, results = ladder.ladder_pages, json.loads(ladder.RESULTS.read_text("utf-8"))
    mean = pages.shown(pages.rows_of(ladder.current(results)))["baseline"].mean("seconds")
    page = (BENCHMARKS.parent / "docs/scale.md").read_text("utf-8")
    assert f"is {mean:.0f} s, the mean training time" in page
    for devices, form in ((1, ".0f"), (8, ".1f"), (100, ".1f")):
        assert f"| {1000 / devices * mean / 3600:{form}} hours |" in page


def test_a_row_with_a_changed_setting_is_only_in_the_zoo(ladder):
    runs = [result("+experiment=a", 0, 0.8), result("+experiment=a data=folder", 0, 0.81)]
    runs += [result("+experiment=a data=folder trainer.max_epochs=1", seed, 0.3) for seed in range(5)]
    ladder.write(runs)
    assert "30.00 ± 0.00% (5)" in (ladder.ROOT / "docs/zoo.md").read_text()
    assert "30.00" not in (ladder.ROOT / "README.md").read_text()
    assert "# Result: 81.00% (1) on " in (ladder.ROOT / "configs/experiment/a.yaml").read_text()


def test_every_experiment_of_the_ladder_has_a_line_for_its_result(ladder):
    for name in set().union(*ladder.LADDER.values()):
        text = (BENCHMARKS.parent / f"configs/experiment/{name}.yaml").read_text("utf-8")
        assert text.count("\n# Result: ") == 1, name


def test_runs_that_were_not_timed_have_no_seconds(ladder):
    unknown = {"seconds": None, "images_per_second": None}
    ladder.write([result("+experiment=a", 0, 0.8, **unknown), result("+experiment=b", 0, 0.9, **unknown)])
    assert "| 80.00% (1) | not timed | not timed |" in (ladder.ROOT / "docs/zoo.md").read_text()
    assert (
        "(1) on A chip, 2 threads, bf16-mixed, torch 2.14.1 (docs"
        in (ladder.ROOT / "configs/experiment/a.yaml").read_text()
    )
    ladder.write([result("+experiment=a", 0, 0.8, **unknown), result("+experiment=a", 1, 0.8, seconds=70)])
    assert "| 80.00 ± 0.00% (2) | 70 | 3,000 |" in (ladder.ROOT / "docs/zoo.md").read_text()


def test_the_checksum_of_a_recipe_depends_on_the_settings_that_decide_results(ladder, monkeypatch):
    monkeypatch.undo()
    settings = ["+experiment=baseline", "data=folder"]
    assert ladder.recipe(settings) == ladder.recipe([*settings, "data.root=elsewhere"])
    assert ladder.recipe(settings) == ladder.recipe([*settings, "logger=csv"])
    assert ladder.recipe(settings) != ladder.recipe([*settings, "optimizer.lr=0.1"])
    assert ladder.recipe(settings) != ladder.recipe(settings[:1])


def test_runs_on_another_folder_are_trained(ladder, monkeypatch):
    """Results and folders of runs on images with another name are not used."""
    folders = []
    monkeypatch.setattr(ladder, "train", lambda folder, settings: folders.append(folder) or 0)
    monkeypatch.setattr(ladder, "result_of", lambda folder: {})
    results = []
    for root in ("one/cifar10", "two/cifar10", "cifar10-jpeg"):
        ladder.train_missing(results, ["resnet20"], ["data=folder", f"data.root={root}"], 1)
    assert [result["images"] for result in results] == ["cifar10", "cifar10-jpeg"]
    assert folders == [ladder.folder_of(result) for result in results]
    assert folders[0] != folders[1]


def test_a_run_that_was_started_untimed_stays_so(ladder, monkeypatch):
    """It is found again after a stop, and then has no seconds either."""
    statuses = iter([130, 0])
    record = json.dumps(RECORD | {"sessions": [session()]})
    monkeypatch.setattr(ladder, "gflop", lambda folder: 0.1)

    def train(folder, settings):
        (folder / "metrics.json").write_text(record)
        return next(statuses)

    monkeypatch.setattr(ladder, "train", train)
    results = []
    with pytest.raises(SystemExit, match="run the same command again"):
        ladder.train_missing(results, ["resnet20"], ["trainer=cpu"], 1, timed=False)
    assert ladder.train_missing(results, ["resnet20"], ["trainer=cpu"], 1) == []
    assert [(result["seconds"], result["images_per_second"]) for result in results] == [(None, None)]


def test_a_stopped_ladder_writes_no_pages(ladder, monkeypatch):
    """Otherwise, the commits in the records of the next runs would be marked as changed."""
    monkeypatch.setattr(ladder, "train", lambda folder, settings: 130)
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--only", "resnet20", "--", "trainer=cpu"])
    with pytest.raises(SystemExit, match="run the same command again"):
        ladder.main()
    assert not ladder.RESULTS.exists()
    assert "old" in (ladder.ROOT / "README.md").read_text()


def test_a_network_without_a_result_is_not_shipped(ladder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--ship", "--only", "resnet20"])
    with pytest.raises(SystemExit, match=r"No results of resnet20: python benchmarks/ladder\.py --only resnet20"):
        ladder.main()


def test_an_experiment_that_is_not_for_this_hardware_is_refused(ladder):
    with pytest.raises(SystemExit, match="No cct8 on this hardware"):
        ladder.train_missing([], ["cct8"], [])


def test_settings_may_follow_only(ladder, monkeypatch):
    calls = []
    monkeypatch.setattr(ladder, "train_missing", lambda *arguments, timed: calls.append(arguments[1:3]) or [])
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--only", "resnet20", "data=folder", "data.root=x"])
    ladder.main()
    assert calls == [(["resnet20"], ["data=folder", "data.root=x"])]


def test_results_of_the_cpu_are_found_on_a_machine_with_a_gpu(ladder, monkeypatch):
    monkeypatch.setattr(ladder.torch.cuda, "is_available", lambda: True)
    cpu = ladder.hardware.describe(ladder.torch.device("cpu"))["name"]
    done = result("+experiment=speedrun trainer=cpu", 0, 0.9, hardware=cpu)
    assert ladder.train_missing([done], ["speedrun"], ["trainer=cpu"], 1) == []


@pytest.mark.parametrize("other", [{"hardware": "Another"}, {"seed": 1}, {"recipe": "before"}, {"command": "+x=1"}])
def test_a_result_of_something_else_does_not_fill_a_row(ladder, monkeypatch, other):
    machine = ladder.hardware.describe(ladder.torch.device("cpu"))["name"]
    same = result("+experiment=speedrun trainer=cpu", 0, 0.9, hardware=machine)
    trained = []
    monkeypatch.setattr(ladder, "train", lambda *arguments: trained.append(arguments) or 1)
    assert ladder.train_missing([same], ["speedrun"], ["trainer=cpu"], 1) == []
    assert ladder.train_missing([same | other], ["speedrun"], ["trainer=cpu"], 1) == ["speedrun with seed 0"]
    assert len(trained) == 1
    assert trained[0][1] == ["+experiment=speedrun", "trainer=cpu", "seed=0"]


def test_a_record_that_cannot_be_read_is_reported(ladder, monkeypatch, capsys):
    """The other runs are trained, and the damaged one is not in the table."""
    monkeypatch.setattr(ladder, "train", lambda folder, settings: 0)

    def result_of(folder):
        record = json.loads(json.dumps(RECORD | {"sessions": [session()]}))
        if folder.name == "0":
            del record["data"]["sha256"]
        (ladder.ROOT / "metrics.json").write_text(json.dumps(record))
        return {"read": ladder.Record.read(ladder.ROOT / "metrics.json").name}

    monkeypatch.setattr(ladder, "result_of", result_of)
    results = []
    assert ladder.train_missing(results, ["resnet20"], ["trainer=cpu"], 2) == ["resnet20 with seed 0"]
    assert [result["seed"] for result in results] == [1]
    assert "metrics.json cannot be read: value of key 'data'" in capsys.readouterr().err


def test_flops_of_a_network_are_those_by_hand(ladder, config, tmp_path):
    """Two FLOP per multiply-add; the convolutions keep the size, and each pair of them halves it."""
    train(config("data.train_size=64", "trainer.max_epochs=1", "scheduler=constant", "threads=2"))
    size, chans, macs = 32, 3, 0
    for pair in ((4, 4), (8, 8)):
        for width in pair:
            macs += size**2 * 9 * chans * width
            chans = width
        size //= 2
    macs += size**2 * 8 * 16 + 16 * 10
    assert ladder.gflop(tmp_path / "run") == pytest.approx(2 * macs / 1e9)
    shown = ladder.result_of(tmp_path / "run")
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (shown["threads"], shown["images"], shown["gflop"]) == (2, "Synthetic", pytest.approx(2 * macs / 1e9))
    assert {key: shown[key] for key in ladder.FROM_RECORD} == {key: record[key] for key in ladder.FROM_RECORD}


@pytest.fixture
def row(ladder):
    return ladder.ladder_pages.Row("A chip", "CIFAR10", "0", "+experiment=a", [result("+experiment=a", 0, 0.84)])


def test_a_shipped_network_is_loaded_by_its_name(ladder, row, run, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder.ship.trained, "FOLDER", tmp_path / "trained")
    ladder.ship.ship(tmp_path, [row], [run], [item for item in LEARNS if item.startswith("data")])
    weights = load_file(tmp_path / "trained/a/model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert cifarnet.load("a").class_names == cifarnet.load(run).class_names
    settings = json.loads((tmp_path / "trained/a/config.json").read_text())
    assert settings["data"] == {"_target_": "cifarnet.data.CIFAR10", "val_fraction": 0}
    card = (tmp_path / "trained/a/README.md").read_text()
    assert "# a: Network a, small" in card
    assert (
        f"test accuracy of these weights | {json.loads((run / 'metrics.json').read_text())['test_accuracy']:.2%} "
        in card
    )
    assert "84.00% (1): mean ± standard deviation" in card


def test_a_network_that_is_less_accurate_in_float16_is_not_shipped(ladder, row, run, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder.ship.trained, "FOLDER", tmp_path / "trained")
    results = [{"test": {"accuracy": accuracy}, "data": {"test": 10000}} for accuracy in (0.84, 0.8397)]
    monkeypatch.setattr(ladder.ship, "evaluate", lambda *arguments: results.pop(0))
    with pytest.raises(SystemExit, match="8,397 correct test images in float16 and 8,400 in float32"):
        ladder.ship.ship(tmp_path, [row], [run], [])
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_ladder_waits_until_its_run_has_saved(ladder, tmp_path, number):
    """A terminal sends Ctrl-C to both processes; SIGTERM is sent to the ladder alone."""
    slow = "import signal, sys, time\n"
    slow += "def end(number, _): time.sleep(0.5); print('saved', flush=True); sys.exit(128 + number)\n"
    slow += "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end); print('up', flush=True)\n"
    slow += "time.sleep(60)\n"
    (tmp_path / "cifarnet").mkdir()
    (tmp_path / "cifarnet/__init__.py").touch()
    (tmp_path / "cifarnet/train.py").write_text(slow)  # replaces the command
    code = f"import sys, os; sys.path.insert(0, {str(BENCHMARKS)!r}); import ladder\n"
    code += f"os.environ['PYTHONPATH'] = os.curdir; os.chdir({str(tmp_path)!r})\n"
    code += "sys.exit(ladder.train(ladder.Path('nothing'), []))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "up\n"
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert (process.communicate(timeout=60)[0], process.returncode) == ("saved\n", 128 + number)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_ladder_continues_where_it_was(ladder, tmp_path):
    """The run in which it was killed is resumed, and finished runs are not repeated."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import ladder; from pathlib import Path\n"
    code += "ladder.LADDER = dict.fromkeys(('cuda', 'cpu'), {'quickstart': 2})\n"
    for name in ("ROOT", "RESULTS"):
        code += f"ladder.{name} = Path({str(getattr(ladder, name))!r})\n"
    command = [sys.executable, "-c", code + "ladder.main()", "trainer.max_epochs=12", *SMALL]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while not (saved := list(tmp_path.glob("lightning_logs/ladder/*/*/1/checkpoints/last.ckpt"))):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    folder = saved[0].parents[1]
    assert not (folder / "metrics.json").exists()
    subprocess.run(command, check=True)
    runs = json.loads(ladder.RESULTS.read_text())
    assert len(json.loads((folder.parent / "0/metrics.json").read_text())["sessions"]) == 1
    assert [(run["seed"], run["epochs"], run["images"]) for run in runs] == [(0, 12, "Synthetic"), (1, 12, "Synthetic")]
    assert len(json.loads((folder / "metrics.json").read_text())["sessions"]) == 2
    page = (tmp_path / "docs/zoo.md").read_text()
    assert "(2)" in page
    assert "`+experiment=quickstart trainer.max_epochs=12 data=synthetic" in page
