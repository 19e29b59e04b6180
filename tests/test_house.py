"""The structure of the source: which way imports run, how long files are, where state may live, how deep calls go."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from conftest import SMALL

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/cifarnet"
FILES = sorted(PACKAGE.rglob("*.py"))
# from top to bottom; modules of one level may import each other, but not in cycles
LEVELS = [
    {"train", "search", "inspect", "evaluate", "audit", "compare", "predict", "export", "demo"},
    {"sweeps", "inspection", "evaluation", "auditing", "formats"},
    {"inference", "records", "callbacks"},
    {"build"},
    {"trainer", "finetuning", "resuming"},
    {"checkpoint", "classifier", "cli", "allowlist"},
    {"data", "models", "optim", "recipes"},
    {"config", "system"},
    {"schema"},
    {"errors", "seeding", "trained", ""},  # "": the package itself, with its version and `load`
]
TRAINING_PATH = ["train.py", "build.py", "data/loader.py", "data/augmentation.py", "models/cnn.py", "classifier.py"]
CONSTANT = r"[A-Z_0-9]+|([A-Z][a-z]+)+|__\w+__"  # or a type alias


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def top_level(name: str) -> str:
    return name.partition(".")[0]


def level(name: str) -> int:
    return next(number for number, packages in enumerate(LEVELS) if top_level(name) in packages)


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules of this project that a file imports, except for type checkers."""
    tree, found = ast.parse(path.read_text("utf-8")), set()
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        names = []
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "cifarnet":
                inner = name.partition(".")[2]
                found.add(inner if inner in modules else inner.rpartition(".")[0])
    return found - {module(path)}


MODULES = {module(path): path for path in FILES}


@pytest.mark.parametrize("name", filter(None, MODULES))
def test_imports_run_downwards(name):
    for other in imported(MODULES[name], MODULES):
        assert level(other) >= level(name), f"{name} imports {other}, from a level above"


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the modules of a cycle of imports, or nothing."""
    seen: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in seen:
            return []
        seen.add(name)
        return next(filter(None, (visit(other, [*path, name]) for other in arrows[name])), [])

    return next(filter(None, (visit(name, []) for name in arrows)), [])


def test_there_are_no_cycles():
    assert cycle({name: imported(path, MODULES) - {""} for name, path in MODULES.items() if name}) == []


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def code_lines(path: Path) -> int:
    """Count the lines of a file without blank lines, comments and docstrings."""
    source = path.read_text("utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_are_counted(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""One\n\ntwo."""\n\nimport os  # three\n# four\nTEXT = """five\nsix"""\n\n\ndef f():\n    """7"""\n'
    )
    assert code_lines(tmp_path / "a.py") == 4


def test_contributing_lists_the_levels():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = [
        {*re.findall(r"`(\w+)(?:\.py|/)`", line)} for line in re.findall(r"^\d+\. .*(?:\.py|/)`$", text, re.MULTILINE)
    ]
    assert listed == [names - {""} for names in LEVELS]


def test_the_source_does_not_grow_unnoticed():
    assert sum(map(code_lines, (ROOT / "src").rglob("*.py"))) <= 10_300


def test_the_training_path_is_short_and_needs_few_packages():
    for name in TRAINING_PATH[1:]:
        packages = {top_level(other) for other in imported(PACKAGE / name, MODULES)}
        assert not packages & {"sweeps", "records", "callbacks", "inference", "evaluation"}, name
    lines = {name: len((PACKAGE / name).read_text("utf-8").splitlines()) for name in TRAINING_PATH}
    assert sum(lines.values()) <= 850, lines


def mutable_state(path: Path) -> list[str]:
    """Return module globals, class attributes and caches that can change."""
    tree, found = ast.parse(path.read_text("utf-8")), []
    scopes = [("", tree.body), *((node.name, node.body) for node in tree.body if isinstance(node, ast.ClassDef))]
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for owner, body in scopes:
        bases = [ast.unparse(base) for base in classes[owner].bases] if owner else []
        is_record = bool(owner) and (
            "dataclass" in ast.unparse(classes[owner]) or {"NamedTuple", "TypedDict"} & {*bases}
        )
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign) and node.value is not None and not is_record:
                targets = [node.target]
            names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            found += [f"{owner}.{name}" for name in names if not re.fullmatch(CONSTANT, name)]
    found += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else []:  # Search.trial = …
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) in {*classes, "cls", "type(self)"}:
                found.append(ast.unparse(target))
        if isinstance(node, ast.FunctionDef):
            found += [name for name in map(ast.unparse, node.decorator_list) if re.search(r"\b(lru_)?cache\b", name)]
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_there_is_no_hidden_state(path):
    assert mutable_state(path) == []


def test_hidden_state_is_found(tmp_path):
    file = tmp_path / "a.py"
    code = "cache = {}\nclass A:\n    trial = None\n@functools.cache\ndef f():\n    global cache\n    A.trial = 1\n"
    file.write_text(code)
    assert mutable_state(file) == [".cache", "A.trial", "global cache", "functools.cache", "A.trial"]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_file_is_longer_than_350_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 350


def users(pattern: str) -> set[str]:
    return {module(path) for path in FILES if re.search(pattern, path.read_text("utf-8"))}


def test_arguments_of_the_process_are_only_read():
    assert users(r"sys\.argv(\[.*\])?\s*=[^=]") == set()


def test_only_build_and_trainer_instantiate():
    assert users(r"\binstantiate\(") == {"build", "trainer"}


def test_each_format_has_one_reader():
    # pretrained weights; a checkpoint, a cache, and the states that a run will save
    assert users(r"\btorch\.load\(") == {"models.library", "system.checkpoint_io", "system.files"}
    assert users(r"metrics\.json\"\)\.read_text|json\.load\(") == set()
    # a record; the settings of a folder for Hugging Face's hub; a run for other ranks; jobs in SLURM's queue
    assert users(r"\bjson\.loads\b") == {"records.json_file", "checkpoint", "system.distributed", "sweeps.slurm"}


def test_figures_are_drawn_where_their_texts_are_made_plain():
    assert users(r"savefig\(|\bcanvas\.draw\(|print_figure\(") == {"records.figures", "inference.figures"}


FRAMES = "+callbacks.frames={_target_: test_house.CountFrames}"


class CountFrames:
    """Created by a run's config; prints its own frames when training starts."""

    def __new__(cls):
        from lightning.pytorch.callbacks import Callback

        class Counter(Callback):
            def on_fit_start(self, trainer, module):
                frame, names = sys._getframe(), []
                while frame is not None and frame.f_code.co_name != "main":
                    if frame.f_code.co_filename.startswith((str(PACKAGE), str(PACKAGE.with_name("hydra_plugins")))):
                        names.append(frame.f_code.co_name)
                    frame = frame.f_back
                print("frames:", *reversed(names), flush=True)

        return Counter()


@pytest.mark.parametrize(("arguments", "most"), [(["hydra.run.dir=run"], 5), (["-m", "hydra.sweep.dir=sweep"], 8)])
def test_few_frames_lie_between_main_and_fit(command, arguments, most):
    status, out, err = command(*arguments, *SMALL, "threads=1", FRAMES)
    assert status == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("frames:")]
    assert len(line.split()) - 1 <= most, line
