"""Lightning's callbacks, the arguments of its Trainer, and torch's schedules.

python -m pytest -m campaign tests/campaign/test_lightning.py -s
"""

import inspect
import json
import math
import random
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from torch.optim import lr_scheduler

from campaign.commands import RUN, Tally, Worker, drawn
from campaign.stops import stop_and_resume

pytestmark = pytest.mark.campaign
USUAL = {  # values of arguments that have no default, or whose type does not tell which texts are valid
    "monitor": "val/accuracy",
    "swa_lrs": 0.01,
    "scheduling": {1: 2},
    "pruning_fn": "l1_unstructured",
    "dirpath": "elsewhere",
    "filename": "saved",
    "duration": "00:00:10:00",
    "write_interval": "epoch",
    "batch_size_fn": {"_target_": "builtins.len", "_partial_": True},
    "lr_lambda": {"_target_": "math.pow", "_partial_": True, "_args_": [0.9]},  # 0.9 to the power of the step
    "milestones": [1],
    "step_size": 2,
    "gamma": 0.7,
    "T_max": 5,
    "T_0": 3,
    "base_lr": 0.001,
    "max_lr": 0.02,
    "total_steps": 20,
    "schedulers": [
        {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 0.5, "total_iters": 2},
        {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9},
    ],
    "max_time": "00:00:10:00",
    "profiler": "simple",
    "gradient_clip_algorithm": "value",
}
VALUES = {  # a usual value, one at an edge, and one that is invalid
    bool: (True, False, "perhaps"),
    int: (2, 0, -2),
    float: (0.5, 0.0, -0.5),
    str: ("auto", "", "nosuch"),
    dict: ({1: 2}, {}, {"nosuch": None}),
    list: ([0], [], ["nosuch"]),
}


def values(annotation: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield a usual, an unusual and an invalid value for each part of a type."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, UnionType) else [annotation]
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            choices = typing.get_args(part)
            yield choices[0], choices[-1], "nosuch"
        elif part is not NoneType:
            yield VALUES.get(typing.get_origin(part) or part, (None, 3, {"a": 1}))


def written(value: Any) -> str:
    """Return a value as that of an override."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return json.dumps(value) if isinstance(value, str | bool | NoneType) else str(value)


def arguments(function: Any, draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Return the arguments without a default, and these with one of the others, `count` times."""
    parameters = list(inspect.signature(function).parameters.values())[1:]  # without `self`
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    named = [one for one in named if one.name != "optimizer"]
    needed = {one.name: USUAL.get(one.name, 3) for one in named if one.default is one.empty}
    hints = typing.get_type_hints(function) if count else {}
    triples = [(one.name, triple) for one in named for triple in values(hints.get(one.name))]
    others = [needed | {name: value} for name, triple in triples for value in triple if value != needed.get(name)]
    return [needed, *draw.sample(others, min(count, len(others)))]


def check_run(worker: Worker, outcomes: Tally, name: str, settings: list[str]) -> None:
    """A run with these settings works and can be resumed, or is refused before it trains."""
    whole = f"{name}-whole"
    start = ["train", *RUN, *settings, f"hydra.run.dir={whole}"]
    outcome, message = worker.run(start[0], start[1:])
    folder = worker.folder / whole
    if outcome == "clear" and not (folder / "checkpoints").exists():
        outcomes.add("refused", start)
    elif outcome != "accepted":
        late = " after training began" if outcome == "clear" else ""
        outcomes.add(f"{outcome}{late}: {message}", start)
    elif not (folder / "metrics.json").exists():
        outcomes.add("status 0, but no metrics.json", start)
    else:
        problem, commands = stop_and_resume(worker, [*RUN, *settings], folder, name)
        outcomes.add(problem, *commands)


def exported() -> dict[str, type]:
    """Return all callbacks that Lightning exports."""
    found = {name: getattr(callbacks, name) for name in callbacks.__all__}
    return {name: one for name, one in found.items() if issubclass(one, L.Callback)}


def test_callbacks_of_lightning(tmp_path, pool, tally, draw):
    outcomes, cases = tally("callbacks of Lightning"), []
    for name, callback in exported().items():
        for fields in arguments(callback.__init__, draw, 3):
            section = {"_target_": f"lightning.pytorch.callbacks.{name}", **fields}
            cases.append([f"+callbacks.x={written(section)}"])
    check = lambda worker, case: check_run(worker, outcomes, f"run{case[0]}", case[1])  # noqa: E731
    pool.for_each(tmp_path, list(enumerate(drawn(cases, draw))), check)
    assert outcomes.wrong == []


def test_arguments_of_the_trainer(tmp_path, pool, tally, draw):
    outcomes, cases = tally("arguments of the Trainer"), []
    hints = typing.get_type_hints(L.Trainer.__init__)
    for name in inspect.signature(L.Trainer).parameters:
        triples = list(values(hints[name]))
        chosen = [USUAL.get(name, draw.choice(triples)[0]), draw.choice(triples)[1], draw.choice(triples)[2]]
        cases += [[f"++trainer.{name}={written(value)}"] for value in chosen]
    check = lambda worker, case: check_run(worker, outcomes, f"run{case[0]}", case[1])  # noqa: E731
    pool.for_each(tmp_path, list(enumerate(drawn(cases, draw))), check)
    assert outcomes.wrong == []


STEPS, EPOCHS, LR = 5, 4, 0.02  # steps in an epoch
PLATEAU = {"mode": "max", "patience": 0, "threshold": 2.0, "threshold_mode": "abs"}  # no accuracy is better by 2


def by_hand(name: str, fields: dict[str, Any], interval: str) -> list[float]:
    """Return the learning rate of each step of a plain loop."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)

    def made(name: str, fields: dict[str, Any]) -> Any:
        values = fields | ({"lr_lambda": lambda step: math.pow(0.9, step)} if "lr_lambda" in fields else {})
        if "schedulers" in values:
            parts = [dict(part) for part in values["schedulers"]]
            values["schedulers"] = [made(part.pop("_target_").rpartition(".")[2], part) for part in parts]
        return getattr(lr_scheduler, name)(**values | ({} if name == "ChainedScheduler" else {"optimizer": optimizer}))

    scheduler, rates = made(name, fields), []
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if interval == "step" and name != "ReduceLROnPlateau":
                scheduler.step()
        if name == "ReduceLROnPlateau":
            scheduler.step(0.5)  # never better
        elif interval == "epoch":
            scheduler.step()
    return rates


def test_schedules_of_torch(tmp_path, pool, tally, draw):
    """The learning rates equal those of a plain loop, also after the run was stopped and resumed."""
    outcomes, cases = tally("schedules of torch"), []
    for name, schedule in inspect.getmembers(lr_scheduler, inspect.isclass):
        if issubclass(schedule, lr_scheduler.LRScheduler) and not name.startswith("_"):
            (fields,) = arguments(schedule.__init__, draw, 0)
            fields |= PLATEAU if name == "ReduceLROnPlateau" else {}
            cases += [(name, fields, interval) for interval in ("step", "epoch")]

    def check(worker: Worker, case: tuple[int, Any]) -> None:
        number, (name, fields, interval) = case
        section = {"_target_": f"torch.optim.lr_scheduler.{name}", **fields}
        settings = ["~scheduler", f"+scheduler={written(section)}", f"trainer.max_epochs={EPOCHS}"]
        settings += ["+module.scheduler_interval=epoch"] if interval == "epoch" else []
        run, file = f"run{number}", worker.folder / f"rates{number}"
        start = ["train", *RUN, *settings, f"hydra.run.dir={run}-whole"]
        outcome, message = worker.run(start[0], start[1:], {"rates": str(file)})
        if outcome != "accepted":
            outcomes.add("refused" if outcome == "clear" else f"{outcome}: {message}", start)
            return
        used = [float(line) for line in file.read_text().split()]
        try:
            expected = by_hand(name, fields, interval)
        except TypeError as error:
            outcomes.add(f"accepted, though a plain loop fails: {error}", start)
            return
        if used != pytest.approx(expected, rel=1e-6):
            outcomes.add(f"the rates are {used} instead of {expected}", start)
            return
        problem, commands = stop_and_resume(worker, [*RUN, *settings], worker.folder / f"{run}-whole", run)
        outcomes.add(problem, *commands)

    pool.for_each(tmp_path, list(enumerate(drawn(cases, draw))), check)
    assert outcomes.wrong == []
