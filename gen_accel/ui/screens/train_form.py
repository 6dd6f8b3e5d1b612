"""The form of a training, with the YAML that its fields come to."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from gen_accel.config import read_mapping, written
from gen_accel.demo import NAME
from gen_accel.io import read_text
from gen_accel.lora.config import OF_DEMO, TrainConfig, print_config
from gen_accel.registry import PRESET, RULES
from gen_accel.served import PUBLISHED
from gen_accel.ui.choices import DENSE, OWN, AttentionChoice
from gen_accel.ui.form import Form
from gen_accel.ui.page import (
    TELLING,
    Held,
    Page,
    by_names,
    refusing,
)
from gen_accel.ui.screens.clips import check_readable
from gen_accel.ui.worker import Options, Values, line_of

FILE = "config.yaml"  # what errors call the YAML on the page
TRAININGS, FIRST = "trainings", "lora"  # folder with one for each training, and the first of them
# Fields that stand first among all settings; all others are folded, by their groups.
MATTER = (
    *("height", "width", "fps", "rank", "learning_rate", "batch_size"),
    *("base", "blocks_to_swap", "gradient_checkpointing"),
    *("held_out", "loss_every", "validate_every", "validation_prompts", "checkpoint_every"),
)
LABELS = {
    "data": "Folder of clips",
    "cache": "Folder of encoded clips",
    "out": "Name",
    "part": "Transformer",
    "condition": "Condition of a clip",
    "first_frame_dropout": "Share without first frame",
    "last_frame_dropout": "Share without last frame",
    "fps": "Frames a second",
    "on_broken": "Broken files",
    "workers": "Threads that read clips",
    "take": "Piece of a long clip",
    "scenes": "Cuts between scenes",
    "sound": "Train the sound too",
    "images": "Share of pictures",
    "held_out": "Clips held out",
    "repeats": "Repeated clips",
    "trigger": "Trigger word",
    "prefix": "Text before captions",
    "default_caption": "Caption of the others",
    "shuffle_tags": "Tags that keep their place",
    "tag_orders": "Orders of tags",
    "max_tokens": "Longest caption",
    "stages": "Frames and steps",
    "trained_frames": "Frames of the model",
    "settings": "Settings of the method",
    "dense_layers": "Dense blocks",
    "dense_steps": "Dense steps",
    "targets": "Layers",
    "lora_dropout": "Dropout",
    "lora_kind": "Kind of LoRA",
    "lora_plus": "LoRA+",
    "dora": "DoRA",
    "rank_stabilised": "Rank-stabilised weight",
    "train_processors": "Train the method too",
    "init_lora": "LoRA to start from",
    "init_adapter": "Adapter to start from",
    "image_dropout": "Share without image",
    "teacher_lora": "LoRA of the teacher",
    "timestep_sampling": "Noise levels drawn",
    "logit_mean": "Mean of noise levels",
    "logit_std": "Spread of noise levels",
    "shift": "Shift of noise levels",
    "sampled_steps": "Steps of a distilled model",
    "huber": "Width of the Huber loss",
    "weighting": "Weights of noise levels",
    "min_snr": "Cut of min-SNR",
    "caption_dropout": "Share without caption",
    "mask_floor": "Weight of black mask",
    "gradient_accumulation": "Accumulated batches",
    "max_grad_norm": "Limit of the gradient",
    "ema_decay": "Moving average",
    "mixed_precision": "Precision",
    "context_parallel": "Processes that share a clip",
    "base": "Storage of the model",
    "blocks_to_swap": "Blocks in CPU memory",
    "gradient_checkpointing": "Recompute to save memory",
    "checkpoint_parts": "Recompute within blocks",
    "checkpoint_every": "Steps between checkpoints",
    "keep_checkpoints": "Checkpoints kept",
    "log_with": "Tracker",
    "loss_every": "Steps between fixed losses",
    "validate_every": "Steps between sample videos",
    "validation_prompts": "Prompts of samples",
    "validation_images": "Images of samples",
    "validation_last_images": "Last images of samples",
    "validation_controls": "Control films of samples",
    "validation_frames": "Frames of samples",
    "validation_steps": "Denoising steps of samples",
    "sample_with": "Techniques of samples",
    "guidance_scale": "Guidance of samples",
}
# Of the embedded model.
DEMO: Values = {name: written(one) for name, one in OF_DEMO.items()}
STAGES = "33:200 is 200 steps of 33 frames, 33:3e is 3 epochs; then longer ones: 81:200,161:600."
# Each choice of the attention but own settings, as fields of a training.
ATTENTION: dict[str, Values] = {
    name: {
        "method": "piecewise",
        "settings": [] if name == PRESET else [f"critical={rule.critical}"],
        "dense_layers": rule.layers,
    }
    for name, rule in RULES.items()
} | {DENSE: {"method": DENSE, "settings": []}}
# Of events that write fields or YAML: one after another.
IN_TURN: Values = {**TELLING, "trigger_mode": "multiple", "concurrency_id": "train-form"}


class TrainForm(Form):
    """Form of all fields of a training, with the YAML that they are beside it.

    Attributes:
        yaml: the text, which a person may edit.
        written: the text as it was last written from here. A YAML that differs was edited, and
            is what counts.
    """

    def __init__(self, page: Page) -> None:
        self.page, self.trainings = page, page.places.folder / TRAININGS
        self.trainings.mkdir(parents=True, exist_ok=True)
        gr.set_static_paths([self.trainings])  # videos and reports, shown from where they lie
        start = {"model": page.models[0], "out": str(self.trainings / FIRST)}
        start |= DEMO if page.models[0] == NAME else {}
        super().__init__(TrainConfig, "train", start, LABELS)

    def settings(self) -> None:
        """Build what is left of the form: four fields, all others folded, and the YAML."""
        models = [*dict.fromkeys((*self.page.models, *PUBLISHED))]
        with gr.Row():
            self.add("model", choices=models, info=None, min_width=200)
            self.add("out", value=FIRST, info=None, min_width=200)
        with gr.Row():
            self.add("stages", info=STAGES, min_width=200)
            self.runs = gr.Dropdown(
                self.earlier(),
                value=None,
                label="Earlier trainings",
                info="Shows one, and takes its settings.",
                elem_id="train-runs",
                min_width=200,
            )
        with gr.Accordion("All settings", open=False, elem_id="train-all"):
            self.attention = AttentionChoice(self.page, self, text="settings")
            for i in range(0, len(MATTER), 2):
                self.row(*MATTER[i : i + 2])
            self.rest()
        text = print_config(TrainConfig.read(self.start))
        with gr.Accordion("The same as a file", open=False, elem_id="train-file"):
            self.yaml = gr.Code(
                text,
                language="yaml",
                label="gen-accel train FILE.yaml",
                elem_id="train-yaml",
                lines=20,
                max_lines=34,
                interactive=True,
            )
            self.load = gr.UploadButton(
                "Load a YAML file", file_types=[".yaml", ".yml"], elem_id="train-load", size="sm"
            )
        self.written = gr.Textbox(text, visible="hidden", elem_id="train-written")
        self.error = gr.HTML(elem_id="train-config-error")
        self._listen()

    def entered(self, held: Held) -> Values:
        found = super().entered(held) | ATTENTION.get(held[self.attention.quality], {})
        out = Path(str(found["out"] or ""))
        return found | ({"out": str(self.trainings / out)} if out.name == str(out) else {})

    def shown(self, values: Options) -> Held:
        out = Path(str(values.get("out", FIRST)))
        name = out.name if out.parent == self.trainings else str(out)
        usual = {field: one.default for field, one in TrainConfig.model_fields.items()}
        told = {field: written(value) for field, value in {**usual, **values}.items()}
        fits = (choice for choice, own in ATTENTION.items() if own.items() <= told.items())
        chosen = next(fits, OWN)
        kept = {field: x for field, x in values.items() if field not in ATTENTION.get(chosen, {})}
        return {**super().shown({**kept, "out": name}), **self.attention.shown(chosen)}

    @property
    def inputs(self) -> set[Block]:
        """Components whose values `read` takes."""
        return {self.yaml, self.written, *self.attention.parts, *self.parts.values()}

    @property
    def outputs(self) -> list[Block]:
        return [self.error, *self.inputs]

    def read(self, held: Held) -> TrainConfig:
        """Make the config of the form, or of the YAML if that was edited last.

        Raises ValueError or OSError for what the library refuses, or for a missing package.
        """
        if held[self.yaml].strip() != held[self.written].strip():
            return self.config(self.fields_in(held[self.yaml]))
        return self._of_fields(held)

    def _of_fields(self, held: Held) -> TrainConfig:
        with self.refused_in_words():
            return self.config(self.entered(held))

    def config(self, values: Options) -> TrainConfig:
        """Make a config of values, which must name no code and no model from elsewhere.

        Raises ValueError or OSError.
        """
        self.page.places.check_sources(values)  # before the library imports what they name
        try:
            made = TrainConfig.read(values)
            from gen_accel.attention_processors.methods.registry import method_from

            method_from(made.method, made.settings)
            return made
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"this cannot be checked: {line_of(error)}") from error

    def fields_in(self, text: str) -> Values:
        """Read the fields that a YAML text gives. Raises ValueError."""
        with tempfile.TemporaryDirectory(prefix="gen-accel-") as folder:
            path = Path(folder) / FILE
            path.write_text(text, encoding="utf-8")
            try:
                return read_mapping(path, verb="train")
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), FILE)) from None

    def checked(self, config: TrainConfig) -> TrainConfig:
        """Return a config that can train: its files are there, and this page may use them.

        Raises ValueError or OSError for another one.
        """
        if not Path(config.out).name:
            raise ValueError("give the training a name")
        self.page.places.check("train", _named_by(config))
        config.check()
        out = Path(config.out).resolve()
        if not out.is_relative_to(self.trainings) or out == self.trainings:
            raise ValueError(
                f"out is {config.out}, and this page trains in {self.trainings}: give "
                f"{self.trainings / out.name}"
            )
        try:
            config.check_files()
            check_readable(config.clips(), self.page.places.readable)
        except ImportError as error:  # of the library that reads a folder of save_to_disk
            raise ValueError(str(error)) from error
        return config

    @contextmanager
    def as_file(self, config: TrainConfig) -> Iterator[str]:
        """Write the file of a config, for the time that it is read.

        Raises ValueError for one that names files which this page may not use.
        """
        self.page.places.check("estimate", _named_by(config))
        with tempfile.TemporaryDirectory(prefix=".asked-", dir=self.page.places.folder) as folder:
            file = Path(folder) / FILE
            file.write_text(print_config(config), encoding="utf-8")
            yield str(file)

    def write(self, config: TrainConfig) -> Held:
        """Show a config as YAML."""
        text = print_config(config)
        return {self.error: "", self.yaml: text, self.written: text}

    def fill(self, given: Options) -> Held:
        """Show values, and the defaults of all others.

        A folder elsewhere for the result becomes one of this page. Raises ValueError or OSError.
        """
        out = Path(str(given.get("out", FIRST)))
        if not out.resolve().is_relative_to(self.trainings):
            given = {**given, "out": str(self.trainings / (out.name or FIRST))}
        config = self.config(given)
        return {**self.shown(vars(config)), **self.write(config)}

    def earlier(self) -> list[str]:
        """Names of the trainings that are there."""
        folders = [one for one in self.trainings.iterdir() if one.is_dir()]
        return sorted(one.name for one in folders if not one.name.startswith("."))

    @property
    def from_fields(self) -> Values:
        """The event that writes the YAML of the fields."""

        def write(held: Held) -> Held:
            return self.write(self._of_fields(held))

        shown = [self.error, self.yaml, self.written]
        return {"fn": refusing(write, self.error), "inputs": self.inputs, "outputs": shown}

    def _listen(self) -> None:
        def from_text(held: Held) -> Held:
            if held[self.yaml].strip() == held[self.written].strip():
                return {self.error: ""}
            return self.fill(self.fields_in(held[self.yaml]))

        def from_file(path: str) -> Held:
            try:
                return self.fill(self.fields_in(read_text(path)))
            except (ValueError, OSError) as error:
                raise by_names(error, [path]) from error

        def of_model(held: Held) -> Held:
            """Show the sizes of a model, where those of the one before still stand."""
            usual = {name: written(self.fields[name].default) for name in DEMO}
            is_demo = held[self.parts["model"]] == NAME
            before, now = self.shown(usual | DEMO), self.shown(usual)
            before, now = (now, before) if is_demo else (before, now)
            sizes = [self.parts[name] for name in DEMO]
            return {x: now[x] if held[x] == before[x] else gr.skip() for x in sizes}

        changed: Values = {"inputs": self.inputs, "outputs": [self.parts[x] for x in DEMO]}
        sized = self.parts["model"].input(of_model, **changed, **IN_TURN)
        sized.then(**self.from_fields, **IN_TURN)
        fields = [one for name, one in self.parts.items() if name != "model"]
        # Gradio tells no input of a text that is pasted or deleted.
        texts = [one.blur for one in fields if isinstance(one, gr.Textbox)]
        others = [self.attention.quality.input, self.parts["settings"].change]
        gr.on([*(one.input for one in fields), *texts, *others], **self.from_fields, **IN_TURN)
        # Not at each letter: the editor also says input if the text was set from here.
        filled = refusing(from_text, self.error)
        self.yaml.blur(filled, self.inputs, self.outputs, **IN_TURN)
        loaded = refusing(from_file, self.error)
        self.load.upload(loaded, [self.load], self.outputs, **IN_TURN)
        seen = [self.page.tab.change, self.runs.focus]
        gr.on(seen, lambda: gr.update(choices=self.earlier()), None, [self.runs], **IN_TURN)


def _named_by(config: TrainConfig) -> Values:
    """Return the fields of a config, with the folders of all its data sets as `data`."""
    return vars(config) | {"data": [one.data for one in config.sets]}
