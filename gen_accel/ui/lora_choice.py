"""Choice of LoRAs from the folders of a page, with a weight for each."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import gradio as gr
from gradio.components import Component
from safetensors import SafetensorError, safe_open

from gen_accel.hub import parted
from gen_accel.ui.page import QUIETLY, TELLING, Held, Page

MOST = 6  # LoRAs at once
LOOKED_AT = 1000  # files of a folder
ABOUT = "Of the folders that the page reads, each with a weight."
NONE = "There is none in the folders that the page reads."
FOLDER_FILE = "pytorch_lora_weights.safetensors"  # which its folder stands for


class LoraChoice:
    """Menu of the LoRAs below the folders of a page, and a slider for each that is chosen."""

    def __init__(self, page: Page, prefix: str) -> None:
        self.chosen = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=MOST,
            allow_custom_value=True,
            label="LoRAs",
            info=ABOUT,
            elem_id=f"{prefix}-lora",
        )
        with gr.Row(elem_classes="ga-fields"):
            self.weights = [
                gr.Slider(-1, 2, 1, step=0.05, visible=False, elem_id=f"{prefix}-weight-{i + 1}")
                for i in range(MOST)
            ]
        self._before = gr.State([])
        self.chosen.change(self._of_choice, {*self.parts}, [*self.parts], **TELLING)
        page.tab.change(lambda: self._listed(page), None, [self.chosen], **QUIETLY)

    @property
    def parts(self) -> set[Component]:
        return {self.chosen, self._before, *self.weights}

    def texts(self, held: Held) -> list[str]:
        """Write the choice as `--lora` takes it: "folder:0.8"."""
        # A weight of 1 goes without saying, unless the name would be split.
        return [
            f"{name}:{weight:g}" if weight != 1 or parted(name)[0] != name else name
            for name, weight in self._weighted(held).items()
        ]

    def shown(self, texts: Sequence[str]) -> Held:
        """Return what the controls show of such texts."""
        found = dict(map(parted, texts[:MOST]))
        return {self.chosen: [*found], self._before: [*found], **self._sliders(found)}

    def _of_choice(self, held: Held) -> Held:
        """Keep the weight of each LoRA that stays."""
        found = self._weighted(held)
        return {self._before: [*found], self.chosen: gr.skip(), **self._sliders(found)}

    def _weighted(self, held: Held) -> dict[str, float]:
        """Map each LoRA that is chosen to its weight, whose slider may not have followed yet."""
        before = zip(held[self._before], (held[one] for one in self.weights), strict=False)
        known = dict(before)
        return {name: known.get(name, 1) for name in held[self.chosen] or ()}

    def _sliders(self, weights: dict[str, float]) -> Held:
        shown: list[object] = [
            gr.update(visible=True, value=weight, label=f"Weight of {Path(name).name}")
            for name, weight in weights.items()
        ]
        shown += [gr.update(visible=False, value=1)] * (MOST - len(shown))
        return dict(zip(self.weights, shown, strict=True))

    def _listed(self, page: Page) -> Held:
        folders = [*page.places.read, page.places.folder]
        found = [*loras_in(folders), *page.places.hub]
        return {self.chosen: gr.update(choices=found, info=ABOUT if found else NONE)}


def loras_in(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """Words and path of each LoRA below folders: its folder, if that holds one by the usual name,
    else its file."""
    found = dict[str, str]()
    for folder in folders:
        for file in islice(folder.rglob("*.safetensors"), LOOKED_AT):
            if not _holds_lora(file):
                continue
            place = file.parent if file.name == FOLDER_FILE else file
            within = place.relative_to(folder)
            found.setdefault(str(place), str(within) if within.parts else place.name)
    return sorted((words, place) for place, words in found.items())


def _holds_lora(file: Path) -> bool:
    """Whether a file has tensors by the names that LoRAs have in any format."""
    try:
        with safe_open(file, "np") as held:
            names = held.keys()
            return any("lora_" in name or ".lora." in name for name in names)
    except (OSError, SafetensorError):
        return False
