import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cifarnet.errors import UserError
from cifarnet.records.evaluation import Evaluation
from cifarnet.records.record import NUMBERS, Record
from conftest import special
from example_record import RECORD, session, write_record


def test_a_record_is_written_as_it_was_read(tmp_path):
    history = [{"epoch": 1, "train/accuracy": 0.5}, {"epoch": 2, "train/accuracy": None}]
    path = write_record(tmp_path, sessions=[session()], history=history, val_accuracy=None) / "metrics.json"
    record = Record.read(path)
    assert (record.seed, record.history, record.sessions[0]["precision"]) == (0, history, "32-true")
    assert math.isnan(record.val_accuracy)
    record.test_accuracy = math.inf
    record.write(tmp_path / "copy.json")
    before, after = (json.loads(file.read_text()) for file in (path, tmp_path / "copy.json"))
    assert after == before | {"test_accuracy": None}
    assert list(after) == [field.name for field in fields(Record)]


def test_numbers_are_what_runs_can_be_compared_by(tmp_path):
    record = Record.read(write_record(tmp_path, val_accuracy=None) / "metrics.json")
    numbers = record.numbers()
    assert numbers["parameters"] == 37426
    assert set(NUMBERS) - set(numbers) == {"val_accuracy"}
    assert not {"name", "tta", "data", "partial"} & set(NUMBERS)


def test_unknown_keys_are_ignored_and_optional_ones_may_be_missing(tmp_path):
    record = RECORD | {"sessions": [], "later": 1}
    (tmp_path / "metrics.json").write_text(json.dumps({key: record[key] for key in record if key != "partial"}))
    assert Record.read(tmp_path / "metrics.json").partial is None


RECORD = RECORD | {"sessions": [session()]}
UNREADABLE = {
    "empty": "",
    "binary": "\udcff\udcfe",
    "cut": '{"val_accuracy": 0.',
    "deep": '{"config": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"val_accuracy": ' + "9" * 10_000 + "}",
    "huge": json.dumps(RECORD | {"val_accuracy": 10**400}),
    "huge seed": json.dumps(RECORD | {"seed": -(10**400)}),
    "huge exponent": json.dumps(RECORD | {"test_cross_entropy": 1.5}).replace("1.5", "1e999"),
    "list": "[1]",
    "number": "3",
    "without history": json.dumps({key: RECORD[key] for key in RECORD if key != "history"}),
    "tta": json.dumps(RECORD | {"tta": 3}),
    "data": json.dumps(RECORD | {"data": {}}),
    "seed": json.dumps(RECORD | {"seed": None}),
    "val_accuracy": json.dumps(RECORD | {"val_accuracy": "0.9"}),
    "sessions": json.dumps(RECORD | {"sessions": [session(), {"precision": "32-true"}]}),
    "history": json.dumps(RECORD | {"history": [{"epoch": 1}, {"epoch": "2"}]}),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_record_is_reported_in_one_sentence(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(
        UserError, match=r"metrics\.json cannot be read: (.|\n)*; delete it or repeat the run\.$"
    ) as error:
        Record.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder", "loop", "large"])
def test_only_regular_files_of_at_most_64_megabytes_are_read(tmp_path, kind):
    path, reason = tmp_path / "metrics.json", "it is not a regular file"
    if kind == "large":
        with path.open("wb") as file:
            file.truncate(64 * 2**20 + 1)
        reason = "it is larger than 64 MB"
    elif kind == "loop":
        path.symlink_to(path)
        reason = "Too many levels of symbolic links"
    else:
        special(path, kind, "/dev/zero")
    with pytest.raises(UserError, match=rf"metrics\.json cannot be read: .*{reason}.*; delete it or repeat the run\.$"):
        Record.read(path)


def test_what_is_not_finite_is_null(tmp_path):
    history = [{"epoch": 1, "train/accuracy": math.inf}]
    path = write_record(tmp_path, val_accuracy=math.inf, test_accuracy=math.nan, history=history) / "metrics.json"
    assert "Infinity" in path.read_text()
    record = Record.read(path)
    assert math.isnan(record.val_accuracy)
    assert math.isnan(record.test_accuracy)
    assert record.history == [{"epoch": 1, "train/accuracy": None}]


def test_the_sentence_names_the_wrong_field(tmp_path):
    for change, name in [({"tta": 3}, "tta"), ({"data": {}}, "train"), ({"sessions": [{}]}, "from_step")]:
        with pytest.raises(UserError, match=name):
            Record.read(write_record(tmp_path, **change) / "metrics.json")


def test_a_record_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        Evaluation.read(write_record(tmp_path) / "metrics.json")


@pytest.mark.parametrize("module", ["record", "evaluation", "tables"])
def test_reading_records_imports_no_torch(module):
    code = f"import sys, cifarnet.records.{module}; assert not {{'torch', 'lightning', 'scipy'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
