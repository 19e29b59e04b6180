"""A search's trials, and the folders they lie in, of which some may be on other machines."""

import platform
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifarnet import cli
from cifarnet.errors import UserError
from cifarnet.records.json_file import read
from cifarnet.records.tables import Run, read_sweep
from cifarnet.system import files

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from cifarnet.sweeps.database import Database

COMMON = "common"  # the study's attribute: what its trials have in common, and what is searched
PLACE = "folder"  # a trial's attribute in a database: on which machine it runs, and where
OUTCOMES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}


def here(folder: Path) -> str:
    """A study's folder as no other is called: machines may share a name, and paths, as copies of one image do."""
    token = folder / "place.txt"
    if not token.exists():
        files.write(token, secrets.token_hex(4))
    return f"{platform.node()}#{read(token, str.strip)}:{folder.resolve()}"


def told(study: "Study", folder: Path, place: str, database: "Database | None") -> dict[str, Run]:
    """The study's trials by number, as far as it knows them: the finished ones, and what other processes are at."""

    def running(trial: "FrozenTrial") -> bool:
        if files.is_locked(folder / f"{trial.number}.lock"):
            return True
        elsewhere = database is not None and trial.user_attrs.get(PLACE) != place  # where only a heartbeat tells
        return elsewhere and not database.heard(trial._trial_id)[1]

    runs = {}
    for trial in study.get_trials(deepcopy=False):
        state = trial.state.name
        if status := "running" if state == "RUNNING" and running(trial) else OUTCOMES.get(state):
            lines = [*study.user_attrs[COMMON]["fixed"], *(f"{key}={value}" for key, value in trial.params.items())]
            settings = {key: value for key, _, value in (line.partition("=") for line in lines)}
            numbers = {} if trial.value is None else {"val_accuracy": trial.value}
            own = Path(trial.user_attrs.get(PLACE, ""), str(trial.number))
            runs[str(trial.number)] = Run(own, settings, status, numbers=numbers)
    return runs


def check_folder(study: "Study", folder: Path) -> None:
    """Refuse one in which another study's trials lie, such as those of a search that had no database."""
    runs = read_sweep(folder)  # first: other processes are at work
    params = {str(trial.number): trial.params for trial in study.get_trials(deepcopy=False)}
    for run in runs:
        own = params.get(run.folder.name)
        if own is None or any(run.settings.get(key, str(value)) != str(value) for key, value in own.items()):
            raise UserError(
                f"{run.folder} is no trial of the study {study.study_name}. Choose another folder with "
                "hydra.sweep.dir=…, or another hydra.sweeper.study_name."
            )


def differences(saved: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """What only one of the two has, of what decides a trial's figures."""
    before, now = (
        {line for line in of["fixed"] if cli.key_of(line) not in ("classes", "data.url", "data.root")}
        | {f"{key} in {values}" for key, values in of["space"].items()}
        for of in (saved, common)
    )
    parts = [f"without {', '.join(sorted(now - before))}"] if now - before else []
    parts += [f"with {', '.join(sorted(before - now))}"] if before - now else []
    return " and ".join(parts)
