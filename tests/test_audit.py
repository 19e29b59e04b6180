import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifarnet import cli
from cifarnet.audit import audit, main
from cifarnet.auditing import scores
from cifarnet.build import build, make_data
from cifarnet.callbacks.dynamics import FILE
from cifarnet.errors import UserError
from cifarnet.records.record import Record
from cifarnet.train import train

# enough steps to learn some of the shapes
LEARNS = [
    *("data=synthetic", "data.train_size=1000", "data.test_size=100", "data.batch_size=50", "trainer.max_epochs=4"),
    *("model=speednet", "model.widths=[8,16,16]", "optimizer=muon", "optimizer.lr=0.1", "scheduler=linear"),
    *("trainer=cpu", "threads=1", "trainer.precision=32-true", "~logger", "callbacks.pictures=null"),
]
SMALL = [*LEARNS, "trainer.max_epochs=1", "data.train_size=200", "data.test_size=50", "model.widths=[8,8,8]"]
RECORDED = "callbacks=dynamics"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with 10% wrong labels."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(cli.compose("train", [*LEARNS, RECORDED, "data.label_noise=0.1", f"output_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def audited(run):
    """Its audit."""
    return audit([run])


@pytest.fixture
def command(command):
    """Run `python -m cifarnet.audit …` in this process, and return its exit status, stdout and stderr."""
    return lambda *arguments: command(*map(str, arguments), main=main)


@pytest.fixture
def source():
    """The training and validation images of the run, and the labels that it was trained on."""
    return make_data(cli.compose("train", [*LEARNS, "data.label_noise=0.1", "output_dir=/nowhere"])).source


def test_wrong_labels_come_first_and_the_true_class_is_suggested(audited, source):
    true = np.arange(1000) % 10  # of synthetic images
    assert audited.index.tolist() == source.train_index.tolist()
    assert audited.given.tolist() == source.train.labels.tolist()
    is_wrong = audited.given != true[audited.index]
    assert is_wrong.sum() == source.selection["wrong_labels"] == 90
    first = audited.ranked[:90]
    assert is_wrong[first].mean() > 0.5  # by chance, 0.1
    assert (audited.suggested == true[audited.index])[is_wrong].mean() > 0.5
    assert audited.count == 9


def test_files(run, audited, source):
    folder = run / "audit"
    assert sorted(path.name for path in folder.iterdir()) == ["audit.csv", "audit.html", "keep.txt", "labels.txt"]
    rows = list(csv.DictReader((folder / "audit.csv").read_text().splitlines()))
    assert len(rows) == 900
    names = source.class_names
    for number, row in zip(audited.ranked.tolist(), rows, strict=True):
        assert int(row["position"]) == audited.index[number]
        labels = names[audited.given[number]], names[audited.suggested[number]]
        assert (row["given"], row["suggested"]) == labels
        for name, values in audited.values.items():
            assert float(row[name]) == pytest.approx(values[number], abs=1e-6)
    suspicion = [float(row["negative_aum"]) for row in rows]
    assert suspicion == sorted(suspicion, reverse=True)
    suspicious = {int(row["position"]) for row in rows[:9]}
    kept = [int(line) for line in (folder / "keep.txt").read_text().split()]
    assert kept == sorted({*source.train_index.tolist()} - suspicious)
    labels = [int(line) for line in (folder / "labels.txt").read_text().split()]
    given = dict(zip(source.train_index.tolist(), source.train.labels.tolist(), strict=True))
    suggested = {int(row["position"]): names.index(row["suggested"]) for row in rows[:9]}
    # images that are set aside for validation keep their true labels
    assert labels == [suggested.get(i, given.get(i, i % 10)) for i in range(1000)]


def test_the_written_files_train(run, audited, tmp_path):
    settings = [*SMALL, "data.train_size=1000"]
    for name, images, wrong in [("keep", 891, 0), ("labels", 900, None)]:
        file = run / f"audit/{name}.txt"
        train(cli.compose("train", [*settings, f"data.{name}={file}", f"output_dir={tmp_path / name}"]))
        data = Record.read(tmp_path / name / "metrics.json").data
        assert data["train"] == images
        assert wrong is None or data["wrong_labels"] == wrong
    corrected = build(cli.compose("train", [*settings, f"data.labels={run}/audit/labels.txt", "output_dir=/nowhere"]))
    wrong = corrected.data.source.selection["wrong_labels"]
    is_right = (audited.suggested == audited.index % 10)[audited.ranked[:9]]
    was_wrong = (audited.given != audited.index % 10)[audited.ranked[:9]]
    assert wrong == 90 - was_wrong.sum() + 9 - is_right.sum()


def test_page(run, audited):
    html = (run / "audit/audit.html").read_text()
    assert "<title>Audit of Synthetic: 9 suspicious labels</title>" in html
    assert "900 training images, 1 run<" in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)  # works offline
    assert html.count("data:image/png;base64,") == 60 + 10 * 12 + 2 * 100
    first = audited.ranked[0]
    assert f"<small>position {audited.index[first]}</small>" in html
    assert f"<small>forgetting {audited.values['forgetting'][first]:.3g}</small>" in html
    assert "out_of_fold" not in html
    assert "nan" not in re.sub('base64,[^"]*', "", html)
    counts = [int(count) for count in re.findall(r"summary>\w+: (\d+) of \d+ labels<", html)]
    assert sum(counts) == 9
    assert len(counts) == 10


def test_command_prints_its_results_and_takes_settings(run, command, tmp_path):
    status, out, error = command(run, "count=90", "duplicates=5", f"output_dir={tmp_path / 'mine'}")
    assert status == 0, error
    assert "90 of 900  (by negative_aum)" in out
    assert re.search(r"most similar images +5 pairs, similarity [01]\.\d{4} to 0\.\d{4}", out)
    assert len((tmp_path / "mine/keep.txt").read_text().split()) == 810
    html = (tmp_path / "mine/audit.html").read_text()
    assert "duplicates=5" in html
    assert f"<code>data.labels={tmp_path / 'mine'}/labels.txt</code>" in html
    assert re.search(r"\n  labels +\S*mine/labels\.txt\n", out)
    assert html.count("data:image/png;base64,") == 60 + 10 * 12 + 2 * 5


def test_runs_of_all_folds_are_audited_out_of_fold(command, tmp_path, monkeypatch):
    pytest.importorskip("cleanlab")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{i % 10 if i % 7 else (i + 3) % 10}\n" for i in range(200)))
    for fold in range(2):
        settings = [*SMALL, RECORDED, "data.folds=2", f"data.fold={fold}", f"data.labels={labels}"]
        train(cli.compose("train", [*settings, f"output_dir={tmp_path}/sweep/{fold}"]))
    status, out, error = command(tmp_path / "sweep", "duplicates=0")
    assert status == 0, error
    assert "200 training images, 2 runs" in (tmp_path / "sweep/audit/audit.html").read_text()
    assert "by out_of_fold" in out
    assert re.search(r"out-of-fold accuracy +\d+\.\d\d%", out)
    assert "most similar" not in out
    rows = list(csv.DictReader((tmp_path / "sweep/audit/audit.csv").read_text().splitlines()))
    assert sorted(int(row["position"]) for row in rows) == list(range(200))
    suspicion = [float(row["out_of_fold"]) for row in rows]
    assert suspicion == sorted(suspicion, reverse=True)
    monkeypatch.chdir(tmp_path)
    status, out, error = command(tmp_path / "sweep/0", tmp_path / "sweep/1", "duplicates=0")
    assert status == 0, error
    (page,) = Path("lightning_logs/audit").glob("*/audit.html")
    assert f"  {page}\n" in out


CAT = "<b>cat<∕b>"


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures."""
    random = np.random.default_rng(0)
    for split, count in [("train", 20), ("test", 6)]:
        for name in (CAT, "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (80, 80, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{number}.png")
    return tmp_path / "pictures"


def train_on(pictures, folder, *overrides):
    settings = [setting for setting in SMALL if not setting.startswith("data")]
    settings += ["data=folder", f"data.root={pictures}", "data.image_size=80", "data.batch_size=9", RECORDED]
    train(cli.compose("train", [*settings, *overrides, f"output_dir={folder}"]))


@pytest.fixture
def sweep(tmp_path):
    """The runs of three folds."""
    for fold in range(3):
        settings = [*SMALL, RECORDED, "data.folds=3", f"data.fold={fold}"]
        train(cli.compose("train", [*settings, f"output_dir={tmp_path}/sweep/{fold}"]))
    return tmp_path / "sweep"


def test_runs_without_a_checkpoint_are_used_for_the_other_scores(sweep, command):
    """A large sweep keeps only the checkpoints of its best runs."""
    pytest.importorskip("cleanlab")
    expected = audit([sweep], ["duplicates=0"])
    assert expected.order == "out_of_fold"
    shutil.copytree(sweep / "0", sweep / "again")
    (sweep / "0/checkpoints/last.ckpt").unlink()
    found = audit([sweep], ["duplicates=0"])
    assert found.values["out_of_fold"].tolist() == expected.values["out_of_fold"].tolist()
    (sweep / "again/checkpoints/last.ckpt").unlink()
    status, out, error = command(sweep, "duplicates=1")
    assert status == 0, error
    one, two = scores.read([sweep / "1", sweep / "2"]).values()
    count = len(np.intersect1d(one["index"], two["index"]))
    assert (
        f"No out-of-fold probabilities, because all runs with checkpoints were trained on {count} of the images" in out
    )
    assert "(by negative_aum)" in out
    for number in (1, 2):
        (sweep / f"{number}/checkpoints/last.ckpt").unlink()
    status, _, error = command(sweep)
    assert status == 1
    assert re.search(r"last\.ckpt: no checkpoint found", error)


def test_images_of_other_sizes_and_streamed_images(pictures, tmp_path):
    train_on(pictures, tmp_path / "run", "data.in_memory=false", "data.workers=0")
    scored = audit([tmp_path / "run"], [f"data.root={pictures}", "count=3"])
    assert len(scored.index) == 36
    paths = [f"train/{name}/{file}" for name in (CAT, "dog") for file in sorted(f"{i}.png" for i in range(20))]
    rows = list(csv.DictReader((tmp_path / "run/audit/audit.csv").read_text("utf-8").splitlines()))
    assert [row["file"] for row in rows] == [paths[int(row["position"])] for row in rows]
    html = (tmp_path / "run/audit/audit.html").read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;cat" in html
    assert html.count("data:image/png;base64,") == 36 + 2 * 12 + 2 * 12
    assert html.count(f"<small>{rows[0]['file'].replace('<', '&lt;').replace('>', '&gt;')}</small>") >= 2
    assert html.count("<small>test/dog/0.png</small>") == 1
    assert not re.search("<small>[a-z ]*position", html)


@pytest.mark.parametrize("noise", [[], ["data.label_noise=0.1"]])
def test_a_folder_that_has_changed_is_refused(pictures, tmp_path, noise):
    train_on(pictures, tmp_path / "run", *noise)
    root = [f"data.root={pictures}", "duplicates=0"]
    audit([tmp_path / "run"], root)
    for number in range(5):
        shutil.copy(pictures / "train/dog/0.png", pictures / "train" / CAT / f"new{number}.png")
    with pytest.raises(UserError, match=r"or its labels differ.*data\.root"):
        audit([tmp_path / "run"], root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.keep=keep.txt"], r"lacks images that .*last\.ckpt was trained on.*without settings"),
        (["data.train_size=500"], r"lacks images that .*last\.ckpt was trained on.*data\.root"),
        (["count=-1"], r"count=-1"),
        (["duplicates=many"], r"duplicates=many"),
        (["counts=3"], r"counts.*Did you mean count"),
        (["output_dir=file/audit"], r"output_dir=file/audit cannot be created"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(run, command, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "keep.txt").write_text("1\n")
    status, _, error = command(run, *arguments)
    assert status == 1
    assert re.search(message, error)
    assert "Traceback" not in error


def test_all_labels_can_be_replaced(run, tmp_path):
    scored = audit([run], ["count=1000000", "duplicates=0", f"output_dir={tmp_path}"])
    assert scored.count == 900
    assert (tmp_path / "keep.txt").read_text() == ""


def test_help_names_no_trained_networks(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["audit", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "trained networks" not in capsys.readouterr().out


def test_a_run_without_dynamics_is_refused(config, command, tmp_path):
    train(config())
    status, _, error = command(tmp_path / "run")
    assert status == 1
    assert re.search(r"run contains no dynamics\.npz.*callbacks=dynamics", error)
    with pytest.raises(UserError, match=r"speedrun contains no dynamics"):
        audit(["speedrun"])


class Missing:
    """Finds no cleanlab, as if it was not installed."""

    def find_spec(self, name, path, target=None):
        if name == "cleanlab":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_is_named(run, command, monkeypatch, tmp_path):
    for number in range(2):
        shutil.copytree(run, tmp_path / f"runs/{number}", ignore=shutil.ignore_patterns("audit"))
        file = tmp_path / f"runs/{number}" / FILE
        with np.load(file) as content:
            arrays = {name: content[name] for name in content}
        half = arrays["index"] % 2 == number
        arrays = {name: values if name == "class_names" else values[..., half] for name, values in arrays.items()}
        np.savez(file, **arrays)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    status, _, error = command(tmp_path / "runs")
    assert status == 1
    assert "pip install 'cifarnet[audit]'" in error


def test_nothing_is_written_through_a_link_out_of_the_run(run, tmp_path):
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("audit"))
    outside.mkdir()
    (copy / "audit").symlink_to(outside)
    with pytest.raises(UserError, match=r"audit is a link"):
        audit([copy])
    assert list(outside.iterdir()) == []


def test_the_random_state_of_the_process_does_not_matter(run, audited, tmp_path):
    torch.manual_seed(123)
    again = audit([run], [f"output_dir={tmp_path}"])
    assert again.ranked.tolist() == audited.ranked.tolist()
    assert (tmp_path / "audit.csv").read_bytes() == (run / "audit/audit.csv").read_bytes()
