"""Odd names of runs, sweeps, classes, pictures, checkpoints and outputs either work or are refused.

python -m pytest -m campaign tests/campaign/test_names.py -s
"""

import json
import shutil
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from campaign.commands import RUN, Worker, drawn
from campaign.stops import difference
from cifarnet.cli import literal
from conftest import picture

pytestmark = pytest.mark.campaign
PUNCTUATION = string.punctuation.replace("/", "")
FORMS = [
    r"$\frac{$",
    "$x$",
    "${x}",
    "${oc.env:HOME}",
    "%s",
    "{epoch}",
    "{0}",
    "~root",
    "$(id)",
    "\x1b[31mred",
    "--help",
]
WORDS = ["", ".", "..", "../up", ".hidden", "null", "true", "nan", "0", "1e5", "CON", "last", "metrics.json", "a.ckpt"]
TEXTS = [
    *(f"a{sign}b" for sign in (*PUNCTUATION, " ", "\n", "\t", "\r", "\x01", "\x7f", "\u202e", "\u200b", "\u2028")),
    *(f"{sign}b" for sign in (*PUNCTUATION, " ", "\n")),
    *(f"a{sign}" for sign in (" ", ".", "\\", "\n")),
    *(unicodedata.normalize(form, text) for text in ("é", "ﬁ", "İ", "각") for form in ("NFC", "NFD")),
    *("猫", "🐈", "x" * 200, "x" * 300, "é" * 127),
    *(FORMS + WORDS),
]
Commands = list[list[str]]
SHORT = [*RUN, "trainer.max_epochs=1", "scheduler=constant"]


@pytest.fixture
def good(tmp_path, pool) -> Path:
    """A finished run in a folder that also holds a picture."""
    assert pool.run(tmp_path, "train", *SHORT, "hydra.run.dir=good") == ("accepted", "")
    picture(tmp_path / "picture.png")
    return tmp_path / "good"


def in_turn(worker: Worker, commands: Commands, place: Path) -> str:
    """Run commands in a folder. Return "refused" if the first is refused, or the problem of the first that fails."""
    for number, (command, *arguments) in enumerate(commands):
        outcome, message = worker.run(command, arguments, folder=place)
        if outcome == "clear" and number == 0:
            return "refused"
        if outcome != "accepted":
            return f"{command}: {outcome}{' after other commands were accepted' if number else ''}: {message}"
    return ""


def run(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    folder, commands = place / text, [["train", *SHORT, f"hydra.run.dir={literal(text)}"]]
    commands += [["train", f"ckpt_path={literal(text)}"], ["compare", str(folder), "output=plot.png"]]
    commands += [["evaluate", str(folder), "corruptions=false"], ["predict", str(folder), "../../../picture.png"]]
    problem = in_turn(worker, commands, place)
    if not problem and not (folder / "metrics.json").is_file():
        problem = f"accepted, but there is no {folder}/metrics.json"
    return problem or difference(place.parents[2] / "good", folder), commands


def name(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    commands = [["train", *SHORT, f"name={literal(text)}"]]
    problem = in_turn(worker, commands, place)
    records = [json.loads(path.read_text()) for path in place.rglob("metrics.json")]
    if not problem and [record["name"] for record in records] != [text]:
        problem = f"the records' names are {[record['name'] for record in records]}"
    return problem, commands


def sweep(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    commands = [["train", "-m", *SHORT, "seed=0,1", f"hydra.sweep.dir={literal(text)}"]]
    commands += [["train", f"sweep.resume={literal(text)}"], ["compare", str(place / text), "output=plot.png"]]
    problem = in_turn(worker, commands, place)
    finished = sorted(path.parent.name for path in (place / text).glob("*/metrics.json"))
    return problem or ("" if finished == ["0", "1"] else f"the records are {finished}"), commands


def class_folder(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    for split in ("train", "test"):
        for kind in (text, "other"):
            for number in range(6):
                picture(place / "tree" / split / kind / f"{number}.png", (number, 9, 9))
    settings = [setting for setting in SHORT if not setting.startswith("data")]
    commands = [["train", *settings, "data=folder", "data.root=tree", "data.batch_size=4", "hydra.run.dir=run"]]
    commands += [
        ["evaluate", "run", "corruptions=false", "data.root=tree"],
        ["predict", "run", "tree/test/other", "output=out.csv"],
    ]
    problem = in_turn(worker, commands, place)
    if problem:
        return problem, commands
    names = json.loads((place / "run/evaluation/metrics.json").read_text())["class_names"]
    same = sorted(unicodedata.normalize("NFC", name) for name in names) == sorted(
        unicodedata.normalize("NFC", name) for name in (text, "other")
    )
    return "" if same else f"the classes are {names}", commands


def picture_file(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    picture(place / "pictures/picture.png")
    (place / "pictures/picture.png").rename(place / "pictures" / f"{text}.png")
    commands = [["predict", "../../../good", "pictures", "output=out.json"]]
    commands += [["predict", "../../../good", f"pictures/{text}.png"]]
    problem = in_turn(worker, commands, place)
    if not problem and f"{text}.png" not in json.dumps(
        json.loads((place / "out.json").read_text()), ensure_ascii=False
    ):
        problem = "" if not text.isprintable() or set(text) & set('\\"') else "the picture is not in out.json"
    return problem, commands


def checkpoint(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    shutil.copy(place.parents[2] / "good/checkpoints/best.ckpt", place / f"{text}.ckpt")
    path = f"{text}.ckpt"
    commands = [["predict", path, "../../../picture.png"], ["evaluate", path, "corruptions=false", "output_dir=out"]]
    commands += [["export", path, "format=hub", "output=hub", "images=3"]]
    finetune = [setting for setting in SHORT if not setting.startswith("model.")]
    commands += [["train", "+experiment=finetune", *finetune, f"model.checkpoint={literal(path)}"]]
    return in_turn(worker, commands, place), commands


def output(worker: Worker, place: Path, text: str) -> tuple[str, Commands]:
    good, commands = "../../../good", []
    made = {
        f"{text}.png": ["compare", good, "output="],
        f"{text}.csv": ["predict", good, "../../../picture.png", "output="],
        f"{text}-evaluation/metrics.json": ["evaluate", good, "corruptions=false", "output_dir="],
        f"{text}-hub/config.json": ["export", good, "format=hub", "images=3", "output="],
    }
    refused = []
    for path, (*command, key) in made.items():
        chosen = path.rpartition("/")[0] or path
        commands.append([*command, f"{key}{literal(chosen)}"])
        problem = in_turn(worker, commands[-1:], place)
        if problem == "refused":
            refused.append(command[0])
        elif problem or not exists(place / path):
            return problem or f"accepted, but there is no {path}", commands[-1:]
    return ("refused" if refused else ""), commands


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long
        return False


Check = Callable[[Worker, Path, str], tuple[str, Commands]]
PLACES: dict[str, Check] = {
    "runs": run,
    "`name`": name,
    "sweeps": sweep,
    "class folders": class_folder,
    "pictures": picture_file,
    "checkpoints": checkpoint,
    "outputs": output,
}
MOST = 45  # of each


@pytest.mark.parametrize("where", PLACES)
def test_odd_names(good, pool, tally, draw, where):
    outcomes, folder = tally(f"names of {where}"), good.parent
    cases = drawn([*TEXTS, *("".join(draw.sample(TEXTS, 2)) for _ in range(len(TEXTS) // 2))], draw)

    def check(worker: Worker, case: tuple[int, str]) -> None:
        number, text = case
        place = folder / "cases" / str(number) / "inside"
        place.mkdir(parents=True)
        try:
            problem, commands = PLACES[where](worker, place, text)
        except OSError:  # the file system has no such name
            return
        strange = [path.name for path in place.parent.iterdir() if path != place]
        outside = f"{strange} lie outside" if strange and ".." not in text.split("/") else ""
        problem = problem or outside
        outcomes.add(f"{text!r}: {problem}" if problem not in ("", "refused") else problem, *commands)

    pool.for_each(folder, list(enumerate(cases[:MOST])), check)
    assert outcomes.wrong == []
