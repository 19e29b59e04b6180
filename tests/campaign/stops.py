"""Stopping a run at a chosen moment, resuming it, and comparing it with an uninterrupted one."""

import json
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from campaign.commands import Worker
from conftest import weights

SAME = "history", "within_epochs", "val_accuracy", "test_accuracy", "tested_epoch", "tested_step", "epochs"
MIDDLE = {"number": int(signal.SIGINT), "moment": "on_train_batch_end", "count": 7}  # the second batch of epoch 2


def difference(one: Path, other: Path, checkpoints: bool = True) -> str:
    """Return what differs between two finished runs; empty if nothing does."""
    files = [sorted(path.name for path in (run / "checkpoints").glob("*.ckpt")) for run in (one, other)]
    if files[0] != files[1]:
        return f"the checkpoints are {files[1]} instead of {files[0]}"
    for name in files[0]:
        first, second = weights(one / "checkpoints" / name), weights(other / "checkpoints" / name)
        gaps = [(first[key].double() - second[key].double()).abs().max().item() for key in first]
        if not all(torch.equal(first[key], second[key]) for key in first):
            return f"the weights of {name} differ by {max(gaps):.2g}"
    records = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    return "; ".join(
        f"{key} is {str(records[1][key])[:200]} instead of {str(records[0][key])[:200]}"
        for key in SAME
        if records[0][key] != records[1][key]
    )


def stop_and_resume(
    worker: Worker, settings: Sequence[str], whole: Path, run: str, probe: Mapping[str, Any] = MIDDLE
) -> tuple[str, list[list[str]]]:
    """Stop a run, resume it and compare it with `whole`. Return the problem, which may be empty, and the commands."""
    folder, number = worker.folder / run, probe["number"]
    start = ["train", *settings, f"hydra.run.dir={run}"]
    moment = (
        f"{signal.Signals(number).name} {probe.get('moment')} {probe.get('count')} {probe.get('after', '')}".strip()
    )
    status, error = worker.execute(start[0], start[1:], probe)
    # before and after training, a signal ends the process as it does by default
    stopped = {128 + number, 0, -number}
    if status not in stopped or "Traceback" in error:
        return f"stopped by {moment}: status {status}, {error.strip()[-300:]}", [start]
    saved = (folder / "checkpoints/last.ckpt").exists()
    if not saved and (folder / "metrics.json").exists():  # it ended before the signal, and saves no checkpoints
        return difference(whole, folder), [start]
    again = ["train", f"ckpt_path={run}"] if saved else start
    outcome, message = worker.run(again[0], again[1:])
    if outcome == "clear" and (advice := re.search(r"classes=\[[\w.]+\]", message)):
        again.append(advice[0])
        outcome, message = worker.run(again[0], again[1:])
    if outcome != "accepted":
        return f"stopped by {moment}, then {outcome}: {message}", [start, again]
    problem = difference(whole, folder)
    return (f"stopped by {moment} (status {status}): {problem}" if problem else ""), [start, again]
