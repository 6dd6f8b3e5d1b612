"""The notebooks: by day small and in this process, by night as they are stored."""

import importlib.util
import re

import IPython.display
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from support.paths import ROOT

from gen_accel import demo

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What each shows: kind and number.
SHOWS = {
    "quickstart": ("image/png", 1),
    "image_prompt": ("image/png", 2),
    "attention_methods": ("image/png", 3),
    "longer_videos": ("image/png", 1),
    "train_lora": ("image/png", 1),
    "tune": ("image/png", 3),
}
# What is smaller by day.
SMALL = {
    "quickstart": {
        "num_frames=33": "num_frames=9",
        "num_inference_steps=20": "num_inference_steps=2",
    },
    "image_prompt": {"FRAMES, STEPS = 33, 10": "FRAMES, STEPS = 9, 2"},
    "attention_methods": {
        "MIDDLE = 4": "MIDDLE = 1",
        "num_inference_steps=8": "num_inference_steps=2",
        "num_inference_steps=3": "num_inference_steps=1",
        "CRITICAL = (0.05, 0.15, 0.4)": "CRITICAL = (0.15,)",
        "SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)": "SHARES = (0.1, 0.4)",
        "(0.1, 0.25, 0.5, 1.0, 1.5)": "(0.5,)",
        "x in (3, 5, 7, 9)": "x in (5,)",
    },
    "longer_videos": {
        "FRAMES, STEPS = 49, 3": "FRAMES, STEPS = 41, 1",
        '"height": 96': '"height": 32',
        '"width": 96': '"width": 32',
    },
    "train_lora": {
        "FRAMES, SIZE = 65, 96": "FRAMES, SIZE = 17, 48",
        "count=8": "count=4",
        "{FRAMES}:10": "{FRAMES}:3",
        "checkpoint_every=5": "checkpoint_every=2",
        "num_inference_steps=4": "num_inference_steps=2",
    },
    "tune": {
        "FRAMES, STEPS = 17, 6": "FRAMES, STEPS = 9, 2",
        ', "a blue square moves down quickly"]': "]",
        "quality=28": "quality=8",
        "quality=24": "quality=6",
    },
}

MOST_BYTES = 1_000_000  # what a code host shows

SPEC = importlib.util.spec_from_file_location("store", ROOT / "notebooks" / "store.py")
assert SPEC is not None
assert SPEC.loader is not None
store = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(store)

BY_DAY = ("quickstart",)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def skip_without_its_adapter(path):
    if path.stem == "image_prompt" and not demo.image_prompt_path().is_dir():
        pytest.skip("the demo model's image prompt is not trained yet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in BY_DAY else pytest.mark.nightly)
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs_small(path, tmp_path, monkeypatch, one_thread):
    skip_without_its_adapter(path)
    matplotlib.use("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(["image/png"] * len(plt.get_fignums())))
    monkeypatch.setattr(IPython.display, "display", lambda _: shown.append("image/png"))
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    for stored, small in SMALL[path.stem].items():
        assert any(stored in source for source in sources), stored
        sources = [source.replace(stored, small) for source in sources]
    names = {"__name__": "__main__"}
    for i, source in enumerate(sources):
        exec(compile(source, f"{path.name}, code {i}", "exec"), names)
        plt.close("all")
    kind, count = SHOWS[path.stem]
    assert shown.count(kind) == count


@pytest.mark.nightly
@every_notebook
def test_notebook_runs(path, tmp_path):
    skip_without_its_adapter(path)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kind, count = SHOWS[path.stem]
    assert sum(kind in output.get("data", ()) for output in outputs) == count


@every_notebook
def test_notebook_is_stored_with_the_outputs_of_its_code(path):
    notebook = nbformat.read(path, as_version=4)
    cells = store.code(notebook)
    assert notebook.metadata.gen_accel.outputs_of == store.sources_hash(notebook), (
        f"the code has changed: python notebooks/store.py {path.stem}"
    )
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    kind, count = SHOWS[path.stem]
    assert sum(kind in output.get("data", ()) for output in outputs) == count
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(root|home|tmp|work)/", text)
    assert path.stat().st_size < MOST_BYTES
    assert f"jupyter lab notebooks/{path.name}" in notebook.cells[0].source
