"""The screen Generate: a form made from the options of `gen-accel generate`, and what it makes."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from gen_accel.config_files import Field
from gen_accel.demo import NAME, TRAINED_FRAMES
from gen_accel.json_files import read_fields
from gen_accel.kinds import FIRST, LAST, VIDEO, choose_in
from gen_accel.names import PRESETS
from gen_accel.paths import expanded
from gen_accel.ui.form import UPLOADED, control, fields_of_verb, options_of, values_of
from gen_accel.ui.page import (
    QUIETLY,
    TELLING,
    Page,
    command_box,
    error_box,
    follow,
    refusing,
)
from gen_accel.ui.plan_line import plan_line
from gen_accel.ui.queue import DONE, QueuedJob

DENSE, OWN = "dense", "own"  # beside the names of presets
QUALITIES = {
    "fast": "Fast",
    "balanced": "Balanced",
    "quality": "Quality",
    DENSE: "Dense",
    OWN: "Own settings",
}
PROMPTS = {
    NAME: (
        "a red square moves right quickly",
        "a blue circle moves down slowly",
        "a green triangle moves left",
        "a yellow square moves up",
    ),
    "": (
        "a cat surfs on a wave at sunset",
        "snow falls on a street at night, cars pass by",
        "a red balloon rises above a city, seen from below",
    ),
}
# Sizes that the embedded model was trained at; other models have their own.
SIZES = {"frames": TRAINED_FRAMES, "height": 96, "width": 96, "steps": 20}
BASIC = ("frames", "height", "width", "steps", "seed")
INPUTS = {FIRST: "image", LAST: "last_image", VIDEO: "video"}
SCHEDULE = ("dense_start", "dense_end", "dense_steps", "dense_layers")
GROUPS = {
    "Sampling": ("guidance_scale", "fps", "max_tokens", "preview"),
    "LoRA and longer video": ("lora", "from_lora", "extend", "trained_frames"),
    "Device and memory": ("dtype", "device", "offload", "kernel", "dense_kernel"),
    "Image prompt": (
        *("image_prompt", "image_adapter", "image_scale", "image_negative", "image_mask"),
        "image_encoder",
    ),
}
# Options that the screen sets itself, or that are other screens'.
ELSEWHERE = (
    *("model", "prompt", "negative_prompt", "preset", "method", "set", "strength"),
    *("out", "prompts", "json", "plan", "gpu", "overwrite", "save_latents", "from_latents"),
    *("ray", "ray_workers"),  # a cluster is no matter of a page
    *("compare", "timed", "metrics", "settings", *BASIC, *INPUTS.values(), *SCHEDULE),
)
EMPTY = '<div class="ga-blank">The video appears here.</div>'
PREVIEW = 2  # steps from one picture to the next
BOXES = 24  # for the fields of a method, of which none has more


def build(page: Page) -> None:
    form = _Form(page)
    with gr.Row(elem_classes="ga-columns"):
        with gr.Column(scale=6, min_width=320):
            form.build()
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="gen-run", scale=2)
                add = gr.Button("Add to queue", elem_id="gen-add", scale=1)
        with gr.Column(scale=7, min_width=320):
            view = follow(page, "gen", kind="generate")
            result = gr.HTML(EMPTY, elem_id="gen-video", elem_classes="ga-result")
            reuse = gr.Button("Use these settings", elem_id="gen-reuse", visible=False, size="sm")

    def submit(*values: Any) -> str:
        options, given = form.asked(values[:-1])
        options |= {"out": "{job}/video.mp4", "json": "{job}/result.json"}
        title = " ".join(options.get("prompt", ["without a prompt"]))
        return page.submit(
            "generate", options, title=title, tab=values[-1], kind="generate", given=given
        ).id

    def show(name: str) -> Any:
        try:
            job = page.queue.job(name)
        except KeyError:
            return EMPTY, gr.update(visible=False)
        return result_box(page, job) or EMPTY, gr.update(visible=job.state == DONE)

    def queued(*values: Any) -> None:
        submit(*values)

    inputs = [*form.inputs, page.tab]
    run.click(refusing(submit, 1), inputs, [view.error, view.job], **QUIETLY).then(
        lambda: (EMPTY, gr.update(visible=False)), None, [result, reuse], **QUIETLY
    )
    add.click(refusing(queued, 0), inputs, [view.error], **QUIETLY)
    view.ended.change(show, [view.ended], [result, reuse], **QUIETLY)
    reuse.click(
        refusing(lambda name: form.shown(page.queue.job(name).options), len(form.outputs)),
        [view.ended],
        [view.error, *form.outputs],
        **TELLING,
    )
    form.earlier.upload(
        refusing(form.read, len(form.outputs)),
        [form.earlier],
        [view.error, *form.outputs],
        **TELLING,
    )


class _Form:
    """The left column.

    Attributes:
        inputs: components whose values `asked` takes, in order.
        outputs: the same, which `shown` fills.
        boxes: for the fields of the method, as many as it has.
        earlier: takes a clip whose settings are read.
    """

    def __init__(self, page: Page) -> None:
        self.page, self.fields = page, fields_of_verb("generate")
        self.controls: dict[str, Any] = {}

    def build(self) -> None:
        page, first = self.page, self.page.models[0]
        model = gr.Dropdown(
            [*page.models],
            value=first,
            label="Model",
            elem_id="gen-model",
            allow_custom_value=True,
            info="A folder or a name on the hub that the page was started with.",
        )
        self._add(self.fields["prompt"], lines=2, max_lines=6, info=None, value=PROMPTS[NAME][0])
        examples = gr.Dataset(
            components=[self.controls["prompt"]],
            samples=_prompts(first),
            label="Examples",
            elem_id="gen-examples",
            samples_per_page=4,
        )
        self._add(self.fields["negative_prompt"], info=None)
        with gr.Group(visible=bool(_kinds(first))) as given:
            with gr.Row():
                for name in INPUTS.values():
                    self._add(self.fields[name], visible=name in _kinds(first))
            self._add(self.fields["strength"], visible="video" in _kinds(first))
        quality = gr.Radio(
            [(words, name) for name, words in QUALITIES.items()],
            value="balanced",
            label="Attention",
            elem_id="gen-quality",
            info="How much of it is left out. Dense leaves out nothing.",
        )
        own = gr.Group(visible=False)
        with own:
            self._method()
        with gr.Row(elem_classes="ga-numbers"):
            for name in BASIC:
                start = {"value": SIZES[name]} if name in SIZES else {}
                self._add(self.fields[name], min_width=90, info=None, **start)
        line = gr.HTML(elem_id="gen-plan")
        with gr.Accordion("Advanced", open=False, elem_id="gen-advanced"):
            self._advanced()
            with gr.Accordion("Settings of an earlier clip", open=False):
                self.earlier = gr.File(
                    label="A clip that was made here or on the command line",
                    elem_id="gen-settings",
                    file_types=[".mp4", ".gif", ".png", ".json"],
                    height=100,
                )
        self.model, self.quality = model, quality
        self.inputs = self.outputs = [model, quality, *self.boxes, *self.controls.values()]
        self._listen(examples, given, own, line)

    def _add(self, field: Field, **changed: Any) -> None:
        self.controls[field.name] = control(field, "gen", **changed)

    def _method(self) -> None:
        """The method, its own fields as it declares them, its schedule; a preset's file."""
        self._add(self.fields["method"])
        with gr.Row(elem_classes="ga-fields", elem_id="gen-sets"):
            self.boxes = [gr.Textbox(visible=False, min_width=150) for _ in range(BOXES)]
        self.untold = gr.HTML(elem_id="gen-sets-error")  # why the fields are not known
        with gr.Row(elem_classes="ga-numbers"):
            for name in SCHEDULE:
                self._add(self.fields[name], min_width=130)
        self._add(self.fields["preset"], label="Preset file")

    def _fields(self, method: str | None) -> dict[str, tuple[str, str]]:
        """Default and meaning of each field of a method. Raises Refused without an answer."""
        known = self.page.questions.known("list")["methods"]
        return next((one["fields"] for one in known if one["name"] == method), {})

    def _boxes(self, method: str | None, held: Mapping[str, str] | None = None) -> list[Any]:
        """Return what `boxes` show of a method.

        Args:
            held: values of its fields; None leaves what is in the boxes.
        """
        made = []
        for name, (default, words) in self._fields(method).items():
            value = {} if held is None else {"value": held.get(name, "")}
            about = {"label": name, "placeholder": default, "info": words}
            made.append(gr.update(visible=True, **about, **value))
        hidden = gr.update(visible=False, value="")
        return [*made, *[hidden] * (BOXES - len(made))]

    def _advanced(self) -> None:
        placed = {name for group in GROUPS.values() for name in group} | {*ELSEWHERE}
        more = tuple(name for name in self.fields if name not in placed)
        for title, group in (GROUPS | ({"More": more} if more else {})).items():
            name = f"gen-{title.lower().replace(' ', '-')}"
            with (
                gr.Accordion(title, open=False, elem_id=name),
                gr.Row(elem_classes="ga-fields"),
            ):
                for name in group:
                    start = {"value": PREVIEW} if name == "preview" else {}
                    self._add(self.fields[name], min_width=170, **start)

    def _listen(self, examples: Any, given: Any, own: Any, line: Any) -> None:
        page, controls = self.page, self.controls
        strength = controls["strength"]
        shown = [controls[name] for name in INPUTS.values()]
        sizes = [controls[name] for name in SIZES]

        def chosen(model: str) -> Any:
            takes = _kinds(model)
            samples = _prompts(model)
            return [
                gr.Dataset(samples=samples),
                gr.update(visible=bool(takes)),
                *(gr.update(visible=name in takes) for name in INPUTS.values()),
                gr.update(visible="video" in takes),
                *(SIZES[name] if model == NAME else None for name in SIZES),
                samples[0][0],
            ]

        self.model.input(
            chosen,
            [self.model],
            [examples, given, *shown, strength, *sizes, controls["prompt"]],
            **QUIETLY,
        )
        examples.click(lambda one: one[0], [examples], [controls["prompt"]], **QUIETLY)

        def opened(quality: str, method: str) -> Any:
            boxes = self._boxes(method) if quality == OWN else [gr.skip()] * BOXES
            return [gr.update(visible=quality == OWN), *boxes]

        method = controls["method"]
        self.quality.change(
            refusing(opened, 1 + BOXES),
            [self.quality, method],
            [self.untold, own, *self.boxes],
            **QUIETLY,
        )
        method.input(
            refusing(lambda name: self._boxes(name, {}), BOXES),
            [method],
            [self.untold, *self.boxes],
            **QUIETLY,
        )
        asking: Any = {"trigger_mode": "always_last", "show_progress": "hidden"}
        asking |= {"api_visibility": "private", "concurrency_limit": 2}
        told = [control for name, control in controls.items() if name not in NOT_PLANNED]
        gr.on(
            [one.change for one in (self.model, self.quality, *self.boxes, *told)],
            self._plan,
            self.inputs,
            [line],
            **asking,
        )
        page.tab.change(self._plan, self.inputs, [line], **asking)

    def _plan(self, *values: Any) -> str:
        """Say what the run will cost, by `gen-accel generate --plan`."""
        try:
            options, given = self.asked(values)
            options = {k: v for k, v in options.items() if k not in ("prompt", "seed", "preview")}
            options |= {k: v for k, v in given.items() if v}
            [found] = self.page.questions.known("generate", {**options, "plan": True})
        except (ValueError, OSError) as error:
            return f'<div class="ga-plan ga-why">{html.escape(str(error))}</div>'
        return plan_line(found)

    def asked(self, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options that the form holds, and the files among them.

        Args:
            values: of `inputs`.
        """
        model, quality, *rest = values
        boxes, rest = rest[:BOXES], rest[BOXES:]
        held = options_of(self.fields, dict(zip(self.controls, rest, strict=True)))
        if "prompt" in held:  # one, on however many lines
            held["prompt"] = [" ".join(held["prompt"])]
        given = {name: held.pop(name) for name in UPLOADED if name in held}
        if quality != OWN:
            for name in ("method", "set", "preset", *SCHEDULE):
                held.pop(name, None)
        if quality in PRESETS:
            held["preset"] = quality
        elif quality == DENSE:
            held["method"] = DENSE
        elif "preset" in held:
            held.pop("method", None)
        else:
            names = self._fields(held.get("method", self.fields["method"].default))
            filled = zip(names, boxes, strict=False)
            sets = [f"{name}={value.strip()}" for name, value in filled if (value or "").strip()]
            held |= {"set": sets} if sets else {}
        return {"model": (model or "").strip(), **held}, given

    def shown(self, options: Mapping[str, Any]) -> list[Any]:
        """Return what `outputs` show of options."""
        preset, method = options.get("preset"), options.get("method")
        quality = OWN
        if preset in PRESETS:
            quality = str(preset)
        elif method == DENSE:
            quality = DENSE
        sets = dict(one.split("=", 1) for one in options.get("set") or () if "=" in one)
        held = {k: v for k, v in options.items() if k in self.controls and v is not None}
        if quality != OWN:
            held.pop("preset", None)
        for name in UPLOADED:
            if name in held:
                held[name] = self._found(held[name])
        values = values_of({name: self.fields[name] for name in self.controls}, held)
        boxes = self._boxes(values.get("method"), sets)
        return [options.get("model"), quality, *boxes, *values.values()]

    def _found(self, files: Any) -> Any:
        """Return files that this page may read; None for others."""
        try:
            some = files if isinstance(files, list) else [files]
            found = [str(self.page.places.readable(one)) for one in some]
            return found if isinstance(files, list) else found[0]
        except ValueError:
            return None

    def read(self, clip: str | None) -> list[Any]:
        """Return what `outputs` show of the settings in a clip, by `--from-settings`."""
        if clip is None:
            return [gr.skip()] * len(self.outputs)
        import yaml

        asked = {"from_settings": clip, "print_config": True}
        text = self.page.questions.said("generate", asked)
        return self.shown(yaml.safe_load(text))


NOT_PLANNED = ("prompt", "negative_prompt", "seed", "preview", "fps")


def result_box(page: Page, job: QueuedJob) -> str:
    """Show the video of a job, and what it was made with."""
    if job.state != DONE:
        return ""
    place = page.queue.store.place(job)
    video = next((f for f in page.queue.store.files(job) if f.suffix == ".mp4"), None)
    if video is None:
        return error_box("the video is not there any more")
    address, facts = page.url(job, video), _facts(job, place / "result.json")
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(v)}</dd>" for name, v in facts.items())
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in job.notes if "warning" in line)
    told = f'<ul class="ga-notes">{notes}</ul>' if notes else ""
    return (
        f'<video controls loop autoplay muted playsinline src="{address}"></video>'
        f'<div class="ga-under"><a href="{address}&amp;download=1" download>Download</a></div>'
        f"<dl>{rows}</dl>{told}<details><summary>The command that does this</summary>"
        f"<pre>{html.escape(command_box(job))}</pre></details>"
    )


def _facts(job: QueuedJob, result: Path) -> dict[str, str]:
    facts = {"prompt": job.title}
    try:
        made = read_fields(result)
    except (OSError, ValueError):  # gone or cut off since: the clip plays without its figures
        return facts
    facts |= {"seed": str(made["seed"]), "made in": f"{made['seconds']:.1f} s"}
    density = made["density"]
    return facts | {"density": "all dense" if density is None else f"{density:.3f} where sparse"}


def _kinds(model: str) -> tuple[str, ...]:
    """Inputs that a model takes beside text, as the names of options. Of a model on the hub, all:
    its files are not here to tell."""
    if model == NAME:
        return ()
    folder = expanded(model) if model else Path()
    if not (folder / "model_index.json").is_file():
        return tuple(INPUTS.values())
    found = []
    for kind, name in INPUTS.items():
        for asked in ((kind,), (FIRST, kind)):
            try:
                choose_in(folder, asked)
            except ValueError:  # the model takes no such input, or only beside the first frame
                continue
            found.append(name)
            break
    return tuple(found)


def _prompts(model: str) -> list[list[str]]:
    return [[one] for one in PROMPTS.get(model, PROMPTS[""])]
