"""The notebook of docs/: it runs from top to bottom, and what it shows was shown by it."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = Path(__file__).parents[1] / "docs/tour.ipynb"
QUICK = '"+experiment=quickstart"'
SMALL = f'{QUICK}, "data.train_size=200", "data.test_size=50", "data.batch_size=20", "trainer=cpu", "threads=1"'


@pytest.fixture
def notebook():
    return nbformat.read(PAGE, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_was_run_from_top_to_bottom(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = "".join(output.get("text", "") for output in outputs)
    assert "test accuracy" in shown
    assert not [place for place in (str(Path.home()), "/tmp/", "site-packages") if place in shown]


def test_it_runs(notebook, tmp_path):
    for cell in code(notebook):
        cell.source = cell.source.replace(QUICK, SMALL)
    source = "\n".join(cell.source for cell in code(notebook))
    assert source.count(SMALL) == 4  # of each training
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=here)
    assert (tmp_path / "tour/rates.png").is_file()
    answer = next(cell for cell in code(notebook) if "classifier.predict" in cell.source)
    assert "%" in answer.outputs[0].text
