"""The notebook: its structure, and a run with fewer images that shows pictures, the report and progress."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
SHORTER = {"train_images=1500, val_images=100": "train_images=24, val_images=4", "minutes=6": "epochs=2"}


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_ten_cells_without_outputs(notebook):
    assert len(notebook.cells) == 10
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source
    assert not any(cell.outputs for cell in code)
    assert 'precision="fp16" if GPU else "fp32"' in "\n".join(cell.source for cell in code)
    assert notebook.metadata.accelerator == "GPU"
    for path in re.findall(r"/blob/main/([^)]+)\)", notebook.cells[-1].source):
        assert (NOTEBOOK.parents[1] / path).is_file()


def outputs(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow
def test_notebook_runs(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    for cell in notebook.cells:
        for old, new in SHORTER.items():
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, install, data, _, training, prediction, _, report, explanation, _ = notebook.cells
    assert not install.outputs
    assert "4 validation images" in "".join(output.get("text", "") for output in data.outputs)
    bars = outputs(training, "text/plain")
    assert any(text.startswith("100%") and "epoch" in text for text in bars), bars
    printed = "".join(output.text for output in training.outputs if output.get("name") == "stdout")
    assert "epoch 2/2" in printed
    assert "AP50" in printed.splitlines()[-1]
    for cell in (prediction, explanation):
        (picture,) = outputs(cell, "image/png")
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) >= 128
    assert outputs(report, "text/html")[0].startswith("<iframe srcdoc=")
