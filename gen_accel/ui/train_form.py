"""The form of a training: its fields, the purpose that fills them, and the YAML beside them."""

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from gen_accel.cli import early
from gen_accel.lora.config import TrainConfig
from gen_accel.names import PUBLISHED
from gen_accel.text_files import read_text
from gen_accel.ui.page import TELLING, Page, error_box
from gen_accel.ui.train_fields import (
    MATTER,
    WITHOUT,
    Control,
    Written,
    all_values,
    config_of,
    controls,
    folded,
    from_page,
    in_words,
    purposes,
    read_yaml,
    starting_values,
    to_page,
    with_purpose,
    write_unchecked,
    write_yaml,
)
from gen_accel.ui.worker import line_of

TRAININGS = "trainings"  # folder in the output folder that has one for each training
FIRST = "lora"  # the first of them
REMEMBERED = 20  # texts that the fields stood for, of which a slow answer may still show one
# Of events that write fields or YAML: one after another, and none waits in the browser, where
# gradio would lose it after an error.
IN_TURN: dict[str, Any] = {**TELLING, "trigger_mode": "multiple", "concurrency_id": "train-form"}
# Gives each field what a purpose wants, unless it holds something else than when the purpose was
# chosen: what a person enters meanwhile stays. In the browser, where no answer is on its way.
FILL_IN = """(wanted, ...fields) => {
  const pairs = JSON.parse(wanted || '[]');
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  return fields.map((now, i) => (pairs[i] && same(now, pairs[i][0]) ? pairs[i][1] : now));
}"""
SUGGESTED: dict[str, dict[str, Any]] = {
    "data": {
        "placeholder": "/data/clips",
        "info": "A folder of videos, clip.txt beside clip.mp4.",
    },
    "stages": {"lines": 2, "info": "Frames and steps, as 81:200, one stage a line."},
}


class Form:
    """Controls of all fields of a training.

    A screen places fields by `add`, then the rest by `settings`. Each event that needs the config
    takes `inputs` first, and `read` makes the config of them.
    """

    def __init__(self, page: Page) -> None:
        self.page, self.controls = page, controls()
        self.trainings = page.places.folder / TRAININGS
        self.trainings.mkdir(parents=True, exist_ok=True)
        gr.set_static_paths([self.trainings])  # videos and reports, shown from where they lie
        places = {"out": str(self.trainings / FIRST)}
        self.start = starting_values(page.models[0], None, places)
        self.parts: dict[str, Any] = {}
        self.agreed = gr.State([])
        self.before = gr.State(self.start)
        self.wanted = gr.Textbox(visible="hidden", elem_id="train-wanted")  # by a purpose

    def add(self, name: str, **changed: Any) -> Any:
        """Make the control of a field, `#train-NAME`."""
        self.parts[name] = _control(self.controls[name], self.start[name], changed)
        return self.parts[name]

    def settings(self) -> None:
        """Build what is left of the form, with the YAML beside it."""
        text = write_unchecked(self.start)
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                self.purpose = gr.Radio(
                    purposes(),
                    value=WITHOUT,
                    label="purpose",
                    info="What for. It fills in fields; what you entered stays.",
                    elem_id="train-preset",
                )
                with gr.Row():
                    models = [*dict.fromkeys((*self.page.models, *PUBLISHED))]
                    self.add("model", choices=models)
                    self.add("out", info="A folder for each training, in the folder of this page.")
                self._in_pairs(MATTER)
                for group, names in folded().items():
                    with gr.Accordion(f"{group}: {', '.join(names)}"[:90], open=False):
                        self._in_pairs(names)
            with gr.Column(scale=5, min_width=320):
                self.yaml = gr.Code(
                    text,
                    language="yaml",
                    label="The same as a file: gen-accel train FILE.yaml",
                    elem_id="train-yaml",
                    lines=20,
                    max_lines=34,
                    interactive=True,
                )
                with gr.Row():
                    self.load = gr.UploadButton(
                        "Load a YAML file", file_types=[".yaml", ".yml"], elem_id="train-load"
                    )
                    self.runs = gr.Dropdown(
                        self.earlier(),
                        value=None,
                        label="earlier trainings",
                        info="Shows one, and takes its settings.",
                        elem_id="train-runs",
                    )
                self.error = gr.HTML(elem_id="train-config-error")
                self.words = gr.HTML(elem_id="train-words")
        self.agreed.value = [text.strip()]  # as the editor gives it
        self._wire()

    @property
    def inputs(self) -> list[Any]:
        """Components whose values `read` takes, in its order."""
        return [self.yaml, self.agreed, *(self.parts[name] for name in self.controls)]

    @property
    def count(self) -> int:
        return 2 + len(self.controls)

    @property
    def filled(self) -> list[Any]:
        """Outputs of what fills the form: see `fill`."""
        return [self.error, self.words, *self.inputs]

    @property
    def written(self) -> list[Any]:
        """Outputs of `from_fields`."""
        return [self.error, self.words, self.yaml, self.agreed]

    def from_fields(self, *values: Any) -> list[Any]:
        """Write the YAML of the fields anew, from the values of `inputs`."""
        written = self._write(self.entered(values))
        agreed = [*values[1], written.text.strip()][-REMEMBERED:]
        return [*self._told(written), written.text, agreed]

    def settled(self, *values: Any) -> list[Any]:
        """Do as `from_fields` where the YAML is not theirs: its answer may be older than they are.

        YAML that a person edited stays.
        """
        text, agreed = values[:2]
        found = self.from_fields(*values) if text.strip() in agreed else None
        if found is None or found[2].strip() == text.strip():
            return [gr.skip()] * len(self.written)
        return found

    def entered(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Values of all fields as a YAML file would give them, from the values of `inputs`."""
        return {
            name: from_page(control, value)
            for (name, control), value in zip(self.controls.items(), values[2:], strict=True)
        }

    def read(self, *values: Any) -> TrainConfig:
        """Make the config of the values of `inputs`: of the YAML where that was edited last.

        Raises ValueError or OSError for what the library refuses, or for a missing package.
        """
        text, agreed = values[:2]
        if text.strip() not in agreed:
            try:
                return config_of(text, self.page.places.check_sources)
            except ImportError as error:
                raise ValueError(line_of(error)) from error
        written = self._write(self.entered(values))
        if written.config is None:
            raise ValueError(written.objection)
        return written.config

    def allowed(self, config: TrainConfig) -> TrainConfig:
        """Return a config that names no code, and files that this page may use alone.

        Raises ValueError for another one.
        """
        self.page.places.check("train", vars(config))
        return config

    def checked(self, config: TrainConfig) -> TrainConfig:
        """Return a config that can train: its files are there, and this page may use them.

        Raises ValueError or OSError for another one.
        """
        self.allowed(config)
        early.check_model(config.model)
        out = Path(config.out).resolve()
        if not out.is_relative_to(self.trainings) or out == self.trainings:
            raise ValueError(
                f"out is {config.out}, and this page trains in {self.trainings}: give "
                f"{self.trainings / out.name}"
            )
        early.check_places(vars(config))
        if config.data is not None:
            from gen_accel.ui.train_clips import check_readable, videos_of

            check_readable(videos_of(config), self.page.places.readable)
        return config

    def fill(self, text: str) -> list[Any]:
        """Values for `filled` from a YAML text, which is written anew with all fields.

        Raises ValueError or OSError for a text that is no config.
        """
        return self.fill_with(read_yaml(text, self.page.places.check_sources))

    def fill_with(self, given: Mapping[str, Any]) -> list[Any]:
        """Do as `fill`, from values. A folder for the result elsewhere is one of this page."""
        values = all_values(given)
        if not Path(str(values["out"])).resolve().is_relative_to(self.trainings):
            values["out"] = str(self.trainings / (Path(str(values["out"])).name or FIRST))
        return self._shown(values, [])

    def earlier(self) -> list[str]:
        """Names of the trainings that are there."""
        return sorted(
            one.name
            for one in self.trainings.iterdir()
            if one.is_dir() and not one.name.startswith(".")
        )

    def _shown(
        self,
        values: Mapping[str, Any],
        agreed: list[str],
        entered: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return what `filled` shows of values.

        Args:
            agreed: see `read`.
            entered: values of the fields, whose controls stay as they are where nothing differs:
                a person may be at one of them while this is on its way. None writes all.
        """
        written = self._write(values)
        fields = [
            gr.skip() if entered and entered[name] == values[name] else to_page(one, values[name])
            for name, one in self.controls.items()
        ]
        kept = [*agreed, written.text.strip()][-REMEMBERED:]
        return [*self._told(written), written.text, kept, *fields]

    def _write(self, values: Mapping[str, Any]) -> Written:
        return write_yaml(values, self.page.places.check_sources)

    def _told(self, written: Written) -> list[str]:
        if written.config is None:
            return [error_box(written.objection or ""), ""]
        return ["", f'<p class="ga-empty">{html.escape(in_words(written.config))}</p>']

    def _in_pairs(self, names: Any) -> None:
        names = [*names]
        for i in range(0, len(names), 2):
            with gr.Row():
                for name in names[i : i + 2]:
                    self.add(name)

    def _wire(self) -> None:
        fields = [one for name, one in self.parts.items() if name != "model"]

        def from_text(*values: Any) -> Any:
            text, agreed = values[:2]
            if text.strip() in agreed:
                return [gr.skip()] * len(self.filled)
            try:
                found = all_values(read_yaml(text, self.page.places.check_sources))
            except (ValueError, OSError, ImportError) as error:
                return [error_box(error), "", *[gr.skip()] * self.count]
            error, words, _, _, *shown = self._shown(found, [], self.entered(values))
            kept = [*agreed, text.strip()][-REMEMBERED:]
            return [error, words, gr.skip(), kept, *shown]

        def from_purpose(purpose: str, before: dict[str, Any], *values: Any) -> Any:
            preset = None if purpose == WITHOUT else purpose
            try:
                entered = self.entered(values)
                self.page.places.check_sources(entered)
                found, start = with_purpose(entered, before, preset)
            except (ValueError, OSError) as error:
                return [gr.skip(), error_box(error), "", ""]
            wanted = {
                name: (was, to_page(control, found[name]))
                for (name, control), was in zip(self.controls.items(), values[2:], strict=True)
                if found[name] != entered[name]
            }
            return [start, "", "", json.dumps([wanted.get(name) for name in self.controls])]

        def from_file(path: str) -> Any:
            return self.fill(read_text(path))

        changed = [one.input for one in fields]
        gr.on(changed, self.from_fields, self.inputs, self.written, **IN_TURN).then(
            self.settled, self.inputs, self.written, **IN_TURN
        )
        # Gradio tells no input of a text that is pasted or deleted.
        texts = [one for one in fields if isinstance(one, gr.Textbox)]
        gr.on([one.blur for one in texts], self.settled, self.inputs, self.written, **IN_TURN)
        # Not at each letter: the editor also says input where the text was set from here.
        self.yaml.blur(from_text, self.inputs, self.filled, **IN_TURN)
        gr.on(
            [self.purpose.input, self.parts["model"].input],
            from_purpose,
            [self.purpose, self.before, *self.inputs],
            [self.before, self.error, self.words, self.wanted],
            show_progress_on=[self.words],
            **{**IN_TURN, "show_progress": "minimal"},
        ).then(
            None,
            [self.wanted, *(self.parts[name] for name in self.controls)],
            [self.parts[name] for name in self.controls],
            js=FILL_IN,
        ).then(self.settled, self.inputs, self.written, **IN_TURN)
        gr.on(
            [self.page.tab.change, self.runs.focus],
            lambda: gr.update(choices=self.earlier()),
            None,
            [self.runs],
            **IN_TURN,
        )
        self.load.upload(
            filling(from_file, self), [self.load], self.filled, show_progress="hidden"
        )


def filling(
    function: Callable[..., list[Any]], form: Form, more: int = 0
) -> Callable[..., list[Any]]:
    """Wrap what fills the form: a refusal shows its sentence and changes nothing else.

    Args:
        more: number of values behind those of `Form.filled`.
    """

    def call(*values: Any) -> list[Any]:
        try:
            return function(*values)
        except (ValueError, OSError, ImportError) as error:
            return [error_box(error), *[gr.skip()] * (1 + form.count + more)]

    return call


def _control(control: Control, value: Any, changed: Mapping[str, Any]) -> Any:
    name = control.field.name
    about: dict[str, Any] = {
        "label": name,
        "info": control.field.help,
        "elem_id": f"train-{name.replace('_', '-')}",
        "value": to_page(control, value),
        **SUGGESTED.get(name, {}),
        **changed,
    }
    if "choices" in about:
        return gr.Dropdown(allow_custom_value=True, **about)
    match control.kind:
        case "choice":
            return gr.Dropdown([*control.choices], **about)
        case "switch":
            return gr.Checkbox(**about)
        case "number":
            return gr.Number(**about)  # without a precision, which would round what is refused
        case "lines":
            return gr.Textbox(max_lines=8, **{"placeholder": "one a line", **about})
    return gr.Textbox(max_lines=4, **{"placeholder": WITHOUT, **about})
