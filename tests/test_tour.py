"""The notebook in docs/ runs from top to bottom, and its stored outputs come from such a run."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = Path(__file__).parents[1] / "docs/tour.ipynb"
QUICKSTART = '"+experiment=quickstart"'
SMALL = f'{QUICKSTART}, "data.train_size=200", "data.test_size=50", "data.batch_size=20", "trainer=cpu", "threads=1"'


@pytest.fixture
def notebook():
    return nbformat.read(PAGE, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_outputs_come_from_one_run(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "".join(output.get("text", "") for output in outputs)
    assert "test accuracy" in text
    assert not [path for path in (str(Path.home()), "/tmp/", "site-packages") if path in text]


def test_notebook_runs(notebook, tmp_path):
    for cell in code_cells(notebook):
        cell.source = cell.source.replace(QUICKSTART, SMALL)
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert source.count(SMALL) == 4  # one per training
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert (tmp_path / "tour/rates.png").is_file()
    cell = next(cell for cell in code_cells(notebook) if "classifier.predict" in cell.source)
    assert "%" in cell.outputs[0].text
