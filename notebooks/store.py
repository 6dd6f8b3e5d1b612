"""Run the notebooks and store them with their outputs: `python notebooks/store.py [NAME ...]`."""

import argparse
import base64
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
TIMEOUT = 900  # seconds of a cell
PNG, COLORS = "image/png", 128


def main() -> None:
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all")
    asked = parser.parse_args().names or names
    if unknown := sorted({*asked} - {*names}):
        parser.error(f"there is no notebook {', '.join(unknown)}: {', '.join(names)}")
    for name in asked:
        print(f"{name} ...", flush=True)
        store(HERE / f"{name}.ipynb")


def store(path: Path) -> None:
    """Run a notebook in an empty folder, and write it with its outputs.

    What its code prints to stderr, such as warnings of libraries, is left out, and so are bars of
    progress. Pictures get a palette, so that a code host shows the notebook.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=TIMEOUT, resources=resources).execute()
    for cell in code(notebook):
        cell.metadata.pop("execution", None)  # times
        cell.outputs = [kept for kept in map(kept_of, cell.outputs) if kept is not None]
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["gen_accel"] = {"outputs_of": sources_hash(notebook)}
    nbformat.write(notebook, path)


def kept_of(output: Any) -> Any:
    """Return an output as it is stored; None where it is left out."""
    if output.output_type == "display_data":
        if PNG not in output.data:
            return None
        output.data = {PNG: with_palette(output.data[PNG])}
    return None if output.get("name") == "stderr" else output


def with_palette(picture: str) -> str:
    """Reduce a PNG, in base64 as is the result, to `COLORS` colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def code(notebook: Any) -> list[Any]:
    """Cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources_hash(notebook: Any) -> str:
    """Hash of all code, by which outputs are told from those of older code."""
    text = "\0".join(cell.source for cell in code(notebook))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
