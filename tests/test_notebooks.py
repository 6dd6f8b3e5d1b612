import nbformat
import pytest
from nbclient import NotebookClient
from support.paths import ROOT

from gen_accel import demo

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWS = {
    "quickstart": ("text/html", 1),
    "image_prompt": ("image/png", 2),
    "attention_methods": ("image/png", 3),
    "longer_videos": ("image/png", 1),
    "train_lora": ("image/png", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    if path.stem == "image_prompt" and not demo.image_prompt_path().is_dir():
        pytest.skip("the demo model's image prompt is not trained yet")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kind, count = SHOWS[path.stem]
    assert sum(kind in output.get("data", ()) for output in outputs) == count


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
