"""The house's own rules, read off the source: which way imports run, how long files are, where state may live."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/cifarnet"
FILES = sorted(PACKAGE.rglob("*.py"))
# from the top of the house to the ground; what is beside each other may import each other, but not in circles
FLOORS = [
    {"train", "search", "evaluate", "compare", "predict", "export", "demo"},
    {"sweeps", "evaluation", "formats"},
    {"inference", "records", "callbacks", "resuming"},
    {"build", "finetuning"},
    {"checkpoint", "classifier", "cli", "allowlist"},
    {"data", "models", "optim", "recipes"},
    {"config", "system"},
    {"errors", "seeding", ""},  # "": cifarnet itself, its version and `load`
]
WAY_OF_A_BATCH = ["train.py", "build.py", "data/loader.py", "data/augmentation.py", "models/cnn.py", "classifier.py"]


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def room(name: str) -> str:
    return name.partition(".")[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


CONSTANT = r"[A-Z_0-9]+|([A-Z][a-z]+)+|__\w+__"  # or a type's other name

MODULES = {module(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "cifarnet":
                own = name.partition(".")[2]
                found.add(own if own in MODULES else own.rpartition(".")[0])
    return found - {module(path)}


@pytest.mark.parametrize("name", MODULES, ids=str)
def test_imports_run_downwards(name):
    if name == "":
        return  # `cifarnet.load` is found on first use
    for other in imported(MODULES[name]):
        assert floor(other) >= floor(name), f"{name} imports {other}, from a floor above"


def test_there_are_no_circles():
    arrows = {name: imported(path) - {""} for name, path in MODULES.items() if name}

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in seen:
            for other in arrows[name]:
                visit(other, [*path, name])
            seen.add(name)

    seen: set[str] = set()
    for name in arrows:
        visit(name, [])
    assert len(seen) == len(arrows)


def test_a_circle_would_be_found(tmp_path, monkeypatch):
    for name, other in [("a", "b"), ("b", "a")]:
        (tmp_path / f"{name}.py").write_text(f"def f():\n    from cifarnet import {other}\n")
    monkeypatch.setitem(globals(), "MODULES", {name: tmp_path / f"{name}.py" for name in "ab"})
    monkeypatch.setitem(globals(), "module", lambda path: path.stem)
    with pytest.raises(AssertionError, match="a -> b -> a"):
        test_there_are_no_circles()


def test_the_way_of_a_batch_needs_no_room_that_a_first_reader_can_do_without():
    for name in WAY_OF_A_BATCH[1:]:
        rooms = {room(other) for other in imported(PACKAGE / name)}
        assert not rooms & {"sweeps", "records", "callbacks", "inference", "evaluation"}, name
    lines = {name: len((PACKAGE / name).read_text("utf-8").splitlines()) for name in WAY_OF_A_BATCH}
    assert sum(lines.values()) < 1040, lines


def state(path: Path) -> list[str]:
    """Module globals and class attributes that could change: lower-case names, and mutable ones that are changed."""
    tree, found = ast.parse(path.read_text("utf-8")), []
    scopes = [("", tree.body), *((node.name, node.body) for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner, body in scopes:
        is_record = any(
            isinstance(node, ast.ClassDef)
            and node.name == owner
            and ("dataclass" in ast.unparse(node) or "NamedTuple" in map(ast.unparse, node.bases))
            for node in ast.walk(tree)
        )
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign) and node.value is not None and not is_record:
                targets = [node.target]
            names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            found += [f"{owner}.{name}" for name in names if not re.fullmatch(CONSTANT, name)]
    found += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Global)]
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):  # Search.trial = …
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) in {*classes, "cls", "type(self)"}:
                found.append(ast.unparse(target))
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_state_in_class_attributes_or_module_globals(path):
    assert state(path) == []


def test_state_would_be_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("cache = {}\nclass A:\n    trial = None\ndef f():\n    global cache\n    A.trial = 1\n")
    assert state(file) == [".cache", "A.trial", "global cache", "A.trial"]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text("utf-8").splitlines()) <= 350


def test_the_whole_does_not_grow_unnoticed():
    """The aim is 5,000 lines."""
    assert sum(len(path.read_text("utf-8").splitlines()) for path in (ROOT / "src").rglob("*.py")) <= 12_100


def test_arguments_of_the_process_are_only_read():
    for path in FILES:
        assert not re.search(r"sys\.argv(\[.*\])?\s*=[^=]", path.read_text("utf-8")), path


def test_only_build_instantiates():
    users = {module(path) for path in FILES if re.search(r"\binstantiate\(", path.read_text("utf-8"))}
    assert users == {"build"}
