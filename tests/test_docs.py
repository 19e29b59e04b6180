"""All commands in the README and docs/ run, on small data, except those of docs/reproduce.md; all settings, links and
files in the pages exist."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from cifarnet import cli
from cifarnet.config import validate
from cifarnet.models import construct
from conftest import picture

ROOT = Path(__file__).parents[1]
REPRODUCE = ROOT / "docs/reproduce.md"  # a table of commands that take hours
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {REPRODUCE})]
# test_python.py runs docs/python.md; docs/other-libraries.md contains code for libraries that are not installed
COMMAND_PAGES = [page for page in PAGES if page.stem not in ("python", "other-libraries")]
RUN_PAGES = [page for page in COMMAND_PAGES if page.stem != "extending"]
USER_FILES = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)```", re.S)  # files that the reader of a page creates
FEW_IMAGES = ["data.train_size=200", "data.test_size=50"]


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's bash blocks, as argument lists. Of a line with `&&`, return the last command."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.S)
    lines = [line.rpartition("&& ")[2] for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def shrink(command: list[str]) -> list[str]:
    """Return the arguments of a command, with settings for a short run and with `<date_time>` replaced."""
    module, arguments = command[2], [fill_in_folder(argument) for argument in command[3:]]
    trains = module in ("cifarnet.train", "cifarnet.search", "cifarnet.inspect")
    if "format=onnx_int8" in arguments:  # few test images: one of them is more than half a point
        arguments.append("tolerance=100")
    if not trains or any("ckpt_path" in argument or "resume" in argument for argument in arguments):
        return arguments
    learns = "name=mine" in arguments  # a test checks its accuracy
    small = ["trainer=cpu", "threads=1"]
    small += ["trainer.max_epochs=2", "data.batch_size=16"] if learns else ["trainer.max_epochs=1", "data.batch_size=8"]
    if module == "cifarnet.search":
        small.append("hydra.sweeper.trials=2")
    if "+experiment=quickstart" in arguments or "data=synthetic" in arguments:
        small += ["data.train_size=2000", "data.test_size=300"] if learns else FEW_IMAGES
    keys = {cli.key_of(argument) for argument in arguments}
    return [*arguments, *(setting for setting in small if cli.key_of(setting) not in keys)]


def fill_in_folder(argument: str) -> str:
    """Replace `<date_time>` by the date and time of the newest matching folder."""
    if "<date_time>" not in argument:
        return argument
    key, equals, path = argument.rpartition("=")
    pattern = path.replace("/<date_time>", "/[0-9]*").replace("<date_time>", "[0-9]*")
    return f"{key}{equals}{max(map(str, Path().glob(pattern)))}"


def draw_pictures(folder: Path) -> None:
    """Write a data set of two classes, each with 20 training and 5 test images."""
    for split, count in [("train", 20), ("test", 5)]:
        for name in ("cat", "dog"):
            for i in range(count):
                picture(folder / split / name / f"{i}.png", (i, 50, 100))


def test_every_page_has_commands():
    assert [len(commands(page)) > 2 for page in COMMAND_PAGES] == [True] * len(COMMAND_PAGES)
    assert {command[0] for page in PAGES for command in commands(page)} <= {"python", "tensorboard"}


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_commands_run(page, command, tmp_path, monkeypatch, archive, published):
    def run(words: list[str]) -> None:
        main = importlib.import_module(words[2]).main
        status, _, error = command(*shrink(words), main=main)
        assert status == 0, f"{' '.join(words)}\n{error}"

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / published.filename).write_bytes(archive["bytes"])
    draw_pictures(tmp_path / "pictures")
    for name in ("cat.jpg", "my holiday.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    for name, code in USER_FILES.findall(page.read_text("utf-8")):
        Path(name).write_text(code)
    if page.stem == "sharing":  # uses a run of the README's first command
        run(["python", "-m", "cifarnet.train", "+experiment=quickstart"])
    if page.stem in ("evaluation", "robustness"):  # they use runs of the README's commands
        for line in ("", "-m seed=range(2)", "-m seed=range(2) optimizer.lr=0.02 hydra.sweep.dir=lightning_logs/rates"):
            run(["python", "-m", "cifarnet.train", *line.split(), "+experiment=quickstart"])
    for words in commands(page):
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[0] == "tensorboard":
            assert tensorboard_answers(words)
        else:
            run(words)


@pytest.mark.parametrize(
    "row", re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,.]+) \|", (ROOT / "docs/zoo.md").read_text())
)
def test_table_of_networks_has_their_sizes(row):
    name, parameters, multiply_adds = row
    model = cli.compose("train", [f"model={name}", "output_dir=run"]).model
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        network = construct(instantiate(model, _partial_=True), num_classes=10, image_size=32)
        network.eval()(torch.zeros(1, 3, 32, 32))
    assert f"{sum(p.numel() for p in network.parameters() if p.requires_grad):,}" == parameters
    assert f"{counter.get_total_flops() / 2e6:,.1f}" == multiply_adds


def test_components_of_the_zoo_have_at_most_ten_lines():
    files = USER_FILES.findall((ROOT / "docs/zoo.md").read_text("utf-8"))
    assert sorted(name for name, _ in files) == ["gray.py", "mine.py", "squared.py"]
    assert max(len(code.strip().splitlines()) for _, code in files) <= 10


def tensorboard_answers(words: list[str]) -> bool:
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words[1:], "--port=0"], stderr=subprocess.PIPE, text=True
    )
    try:
        return any("at http://localhost:" in line for line in process.stderr)
    finally:
        process.kill()
        process.communicate()


def test_components_need_no_change_of_other_files(tmp_path, monkeypatch):
    """Write the files of the page into a copy of the project and run its commands there."""
    text = (ROOT / "docs/extending.md").read_text("utf-8")
    for folder in ("src", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    written = 0
    for place, code in re.findall(r"`((?:src|configs)/[\w/.]+)`[^`]*```(?:python|yaml)\n(.*?)```", text, re.S):
        assert not (tmp_path / place).exists()
        (tmp_path / place).write_text(code)
        written += 1
    assert written == 5
    draw_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)

    lines = [[words[2], *words[3:]] for words in commands(ROOT / "docs/extending.md")]
    classes = {"mine": "", "squeezenet": "torchvision.models.SqueezeNet", "brightness": ""}
    for name, allowed in classes.items():
        for module, more in [("train", ""), ("evaluate", "corruptions=false")]:
            path = f"lightning_logs/{name}/<date_time>"
            run = [f"cifarnet.{module}", f"ckpt_path={path}" if module == "train" else path, more]
            lines.append([*filter(None, run), *([f"classes=[{allowed}]"] if allowed else [])])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "src"), str(ROOT / "tests")])}
    program = [sys.executable, "-c", DRIVER, json.dumps(lines), json.dumps(classes)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, chance in {"mine": 0.1, "brightness": 0.5}.items():
        tested = [json.loads(file.read_text()) for file in Path(f"lightning_logs/{name}").glob("*/metrics.json")]
        assert max(metrics["test_accuracy"] for metrics in tested) > chance + 0.2, name
    assert result.stdout.count("torch.Size([1, ") == 3


DRIVER = """
import importlib, json, sys
import torch, torchvision
from hydra.core.global_hydra import GlobalHydra
import cifarnet
from test_docs import fill_in_folder, shrink
for module, *arguments in json.loads(sys.argv[1]):
    GlobalHydra.instance().clear()
    arguments = shrink(["python", "-m", module, *arguments])
    before, sys.argv = sys.argv, [module, *arguments]
    try:
        importlib.import_module(module).main()
    except SystemExit as end:
        assert not end.code, (module, arguments)
    sys.argv = before
assert "/src/cifarnet" in cifarnet.__file__ and "pytest" in cifarnet.__file__, cifarnet.__file__
for name, allowed in json.loads(sys.argv[2]).items():
    path = fill_in_folder(f"lightning_logs/{name}/<date_time>")
    network, names = cifarnet.load(path, [eval(allowed)] if allowed else [])
    print(network(torch.zeros(1, 3, *(2 * [16 if name == "brightness" else 32]), dtype=torch.uint8)).shape)
"""


def settings(page: Path) -> list[str]:
    """Return the settings in a page's tables: the code spans in the second cell of each row."""
    rows = [line.split("|")[2] for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row) if re.match(r"[+~']*[\w.]+=|'~", span)]


@pytest.mark.parametrize("setting", settings(ROOT / "README.md"))
def test_settings_in_the_readme_are_valid(setting):
    config = cli.compose("train", ["data=synthetic", "output_dir=run", *shlex.split(setting)])
    validate(config)


def test_statements_of_other_libraries_are_counted():
    text = (ROOT / "docs/other-libraries.md").read_text("utf-8")
    blocks = re.findall(r"\((\d+) statements\):\n\n```python\n(.*?)```", text, re.S)
    counts = [sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(code))) for _, code in blocks]
    assert [int(stated) for stated, _ in blocks] == counts
    assert set(map(int, re.findall(r"\*\*(\d+)\*\*", text))) == {1, *counts}  # 1: the commands of cifarnet


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 250


OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/LOG.md", "docs/reproduce.md")
OTHER_PAGES = [ROOT / name for name in OTHERS]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: f"{page.parent.name}_{page.stem}")
def test_linked_and_named_files_exist(page):
    text = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    created = dict(USER_FILES.findall(text))
    for name in set(re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)`", text)) - created.keys():
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src/cifarnet", ROOT / "tests")), name


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_workflow_runs_the_commands_of_the_readme():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python3 -m venv")]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert [line in workflow for line in lines] == [True, True]
