"""The screen Generate, and the form of a run that the screens Compare and Longer have too."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from random import randrange

import gradio as gr
import yaml
from gradio.components import Component
from gradio.context import Context

from gen_accel.attention_processors.families.pipelines import choose_in
from gen_accel.demo import NAME
from gen_accel.hub import index_in
from gen_accel.io import read_fields
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.registry import (
    CACHES,
    FIRST,
    LAST,
    LEAST_TOKENS,
    PRESET,
    PRESETS,
    VIDEO,
    cached_in_few,
    too_small,
)
from gen_accel.ui.choices import DENSE, OWN, OWN_START, AttentionChoice, LoraChoice
from gen_accel.ui.form import Form
from gen_accel.ui.page import (
    ADDING,
    ASKING,
    QUIETLY,
    TELLING,
    Held,
    Page,
    by_names,
    duration,
    follow,
    html,
    refusing,
)
from gen_accel.ui.queue import DONE, QueuedJob
from gen_accel.ui.worker import Options, Values, command_line

# Sizes by words, as width x height; a model's own are the nearest that it makes.
CUSTOM, AS_MODEL = "custom", ""
ANY = (1, 1)  # pixels that divide height and width, as long as no plan has told them
MENU = {
    "480p, 16:9": "832x480",
    "480p, 9:16": "480x832",
    "480p, 1:1": "640x640",
    "720p, 16:9": "1280x720",
    "720p, 9:16": "720x1280",
    "720p, 1:1": "960x960",
}
# Writes height and width of a size, in the browser: what is pressed next finds them there.
SIDES = """(size, ...sides) =>
  size === 'custom' ? sides : size ? size.split('x').reverse() : ['', '']"""
MOST_CLIPS = 16  # that one press queues
SEEDS = 2**31  # random seeds lie below
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
INPUTS = {FIRST: "image", LAST: "last_image", VIDEO: "video"}
# Fields of several videos, and those that a screen gives by itself.
ELSEWHERE = (
    *("model", "out", "prompts", "overwrite", "save_latents", "settings", "from_latents"),
    *("ray", "ray_workers", "compare", "timed", "metrics", "lora", "resume"),
)
WHOLE = ("preset", "preview")  # which this page begins with, and a stream goes without
# Fields of a clip whose default is the model's own, as a plan calls them.
PLANNED = {"frames": "num_frames", "height": "height", "width": "width", "steps": "steps"}
NOT_PLANNED = ("prompt", "negative_prompt", "seed", "preview")  # of no matter for the cost
BY_RULE = "is a rule for this model"  # warning of a preset that nobody tuned
FIRST_SHOWN = "gen"  # prefix of the screen that a page opens with
PREVIEW = 2  # steps from one picture to the next


class RunForm(Form):
    """Form of `gen-accel generate`: model, prompt, attention and sizes, then all other fields.

    Args:
        compares: whether each clip is made densely too, so that Dense is no choice.
        many: whether one press may make several clips, of one seed after another.
        start: values of fields at first.
        first: fields that stand above the advanced ones.
        frames: options of the control of the frames, which is a slider with them.
    """

    def __init__(
        self,
        page: Page,
        prefix: str,
        *,
        compares: bool = False,
        many: bool = False,
        start: Options,
        first: Collection[str] = (),
        frames: Options | None = None,
    ) -> None:
        self.page, self.compares, chosen = page, compares, page.models[0]
        super().__init__(GenerateConfig, prefix, {**OWN_START, **start})
        self.model = gr.Dropdown(
            [*page.models],
            value=chosen,
            label="Model",
            elem_id=f"{prefix}-model",
            allow_custom_value=True,
        )
        prompt = self.add("prompt", lines=2, info=None, value=_prompts(chosen)[0][0])
        self.examples = gr.Dataset(
            components=[prompt],
            samples=_prompts(chosen),
            label="Examples",
            elem_id=f"{prefix}-examples",
            samples_per_page=4,
        )
        takes = _inputs(chosen)
        with gr.Group(visible=bool(takes)) as self.given_files:
            with gr.Row():
                for name in INPUTS.values():
                    self.add(name, visible=name in takes)
            self.add("strength", visible="video" in takes)
        self.attention = AttentionChoice(page, self, dense=not compares)
        with gr.Row(elem_classes="ga-numbers"):
            self.size = gr.Dropdown(
                _sizes(chosen),
                value=AS_MODEL,
                label="Size",
                elem_id=f"{prefix}-size",
                min_width=210,
            )
            self.multiples = gr.State([*ANY])
            for name in ("height", "width"):
                self.add(name, min_width=90, info=None)
        with gr.Row(elem_classes="ga-numbers"):
            if frames is not None:
                about = {"label": "Frames", "elem_id": f"{prefix}-frames", "scale": 3}
                self.parts["frames"] = gr.Slider(**{"min_width": 220, **about, **frames})
            lengths = ("frames", "seconds") if frames is None else ()
            for name in (*lengths, "steps"):
                self.add(name, min_width=90, info=None)
        with gr.Row(elem_classes="ga-numbers"):
            self.add("seed", min_width=90, info=None)
            about = {"elem_id": f"{prefix}-random", "min_width": 160}
            self.random = gr.Checkbox(label="Random seed", **about)
            about = {"elem_id": f"{prefix}-count", "min_width": 90, "visible": many}
            self.count = gr.Number(1, label="Clips", **about)
        self.small = gr.HTML(elem_id=f"{prefix}-small")
        self.loras = LoraChoice(page, prefix)
        with gr.Row(elem_classes="ga-fields"):
            self.add("quantize", min_width=180)
            self.add("cache", choices=[("none", ""), *CACHES], min_width=180)
        for name in first:
            self.add(name, **({"choices": []} if name == "from_lora" else {}))
        self.line = gr.HTML(elem_id=f"{prefix}-plan")
        with gr.Accordion("Advanced", open=False, elem_id=f"{prefix}-advanced"):
            self.rest((*ELSEWHERE, "seconds", *(() if many else ("stream", "zones"))))
            with gr.Accordion("Settings of an earlier clip", open=False):
                self.earlier = gr.File(
                    label="A clip that was made here or on the command line",
                    elem_id=f"{prefix}-settings",
                    file_types=[".mp4", ".gif", ".png", ".json"],
                    height=160,
                )
        self._listen([name for name in PLANNED if frames is None or name != "frames"])

    @property
    def inputs(self) -> set[Component]:
        """Components whose values `asked` takes."""
        beside = (self.model, self.size, self.random, self.count)
        return {*beside, *self.attention.parts, *self.loras.parts, *self.parts.values()}

    def asked(self, held: Held) -> tuple[Values, Values]:
        """Return the options that the form holds, and the files among them."""
        found = {"model": (held[self.model] or "").strip(), **self.given(held)}
        if loras := self.loras.texts(held):
            found["lora"] = loras
        if "prompt" in found and "stream" not in found:  # one, on however many lines
            found["prompt"] = [" ".join(found["prompt"])]
        files = {name: found.pop(name) for name in [*found] if self.fields[name].accept}
        found = self.attention.applied(found, held)
        if "stream" in found:  # as --stream runs
            found = {name: one for name, one in found.items() if name not in WHOLE}
        return found, files

    def planned(self, options: Options, files: Options) -> Values:
        """Forecast a run, as `gen-accel generate --plan` does.

        Raises ValueError or OSError for what the library refuses, in the words of the form.
        """
        kept = {name: one for name, one in options.items() if name not in NOT_PLANNED}
        with self.refused_in_words():
            GenerateConfig.read(options)
            asked = {**kept, **files, "plan": True}
            [found] = self.page.questions.known("generate", asked)
            if found.get("fetch_bytes"):  # which a job may have fetched since
                [found] = self.page.questions.ask("generate", asked)
        return found

    def submit(
        self,
        held: Held,
        kind: str,
        title: str = "",
        *,
        about: Options | None = None,
        **more: object,
    ) -> QueuedJob:
        """Queue the clips that the form asks for, and return the job of the first.

        Args:
            title: is added to the prompt.
            about: is kept with the job.
            more: further options.

        Raises ValueError or OSError for what `planned` refuses, so that no job fails by it, and
        for no prompt and a number of clips that one press does not make.
        """
        options, files = self.asked(held)
        if "prompt" not in options:
            raise ValueError("write a prompt: what the video shows")
        count = 1 if held[self.count] is None else held[self.count]
        if count not in range(1, MOST_CLIPS + 1):
            raise ValueError(f"Clips must be a whole number from 1 to {MOST_CLIPS}, got {count:g}")
        self.planned(options, files)
        options |= {"out": "{job}/video.mp4", **more}
        seed = randrange(SEEDS) if held[self.random] else options.get("seed", 0)
        jobs = [
            self.page.queue.submit(
                "generate",
                {**options, "seed": seed + i},
                title=f"{title_of(options)}{title}{f', seed {seed + i}' * (count > 1)}",
                tab=held[self.page.tab],
                kind=kind,
                given=files,
                about=about or {},
            )
            for i in range(int(count))
        ]
        return jobs[0]

    def filled(self, options: Options) -> Held:
        """Return what the form shows of options."""
        held = {name: value for name, value in options.items() if value is not None}
        preset, quality = held.get("preset"), OWN if "method" in held else PRESET
        if preset is not None:
            quality = str(held.pop("preset")) if preset in PRESETS else OWN
        elif held.get("method") == DENSE:
            quality = DENSE
        for name in [*held]:
            if name in self.fields and self.fields[name].accept:
                held[name] = self._readable(held[name])
        beside: Held = {self.model: held.get("model"), **self.attention.shown(quality)}
        beside |= {self.random: False, self.count: 1}
        beside |= {self.size: _size_of(held.get("height"), held.get("width"), ANY)}
        if quality != OWN:
            held |= OWN_START
        return {**beside, **self.loras.shown(held.get("lora", ())), **self.shown(held)}

    def at_first(self) -> Held:
        """Return what a form without a job shows beside its start."""
        return {self.line: gr.skip()}

    def read_clip(self, clip: str | None) -> Held:
        """Return what the form shows of the settings in a clip, by `--from-settings`."""
        if clip is None:
            return {self.model: gr.skip()}
        asked = {"from_settings": clip, "print_config": True}
        try:
            told = self.page.questions.said("generate", asked)
        except (ValueError, OSError) as error:
            raise by_names(error, [clip]) from error
        return self.filled(yaml.safe_load(told))

    def come_back(self, kind: str) -> None:
        """Show the settings of the last job of a tab that is loaded again, else `at_first`."""

        def look(tab: str) -> Held:
            job = self.page.last(kind, tab)
            return self.at_first() if job is None else self.filled(job.options)

        shown = [self.line, *self.inputs]
        self.page.tab.change(refusing(look, self.line), [self.page.tab], shown, **TELLING)

    def watch(self) -> None:
        """Show the cost of a run whenever something changes, and the model's own sizes."""
        told = [part for name, part in self.parts.items() if name not in NOT_PLANNED]
        loras = (self.loras.chosen, *self.loras.weights)
        changed = [one.change for one in (self.model, self.attention.quality, *loras, *told)]
        first = self.prefix == FIRST_SHOWN  # the others ask when they are opened
        opened = self.page.tab.change if first else tab_of().select
        shown = [self.line, self.small, self.size, self.multiples, *self._sized.values()]
        inputs = {self.multiples, *self.inputs}
        gr.on([*changed, opened], self.told, inputs, shown, **ASKING)

    def told(self, held: Held) -> Held:
        """Return the line of a plan and the model's own sizes, or why there is no plan."""
        model = (held[self.model] or "").strip()
        try:
            options, files = self.asked(held)
            found = self.planned(options, files)
        except (ValueError, OSError) as error:
            if any(held[self.parts[name]] for name in INPUTS.values()) or not _waits(model):
                return {self.line: html("why", str(error)), self.small: ""}
            shown: Held = {self.line: html("hint", str(error)), self.small: ""}
            with suppress(ValueError, OSError):
                usual = self.page.questions.known("estimate", {"model": model})
                shown |= self._own(usual, held)
            return shown
        if "stream" in options:
            return {self.line: stream_line(found), self.small: ""}
        quality = held[self.attention.quality]
        is_dense, sparse = quality == DENSE, None if quality == OWN else ()  # as presets do
        told = [] if is_dense else [too_small(found["tokens"], found["steps"], sparse)]
        cache = str(options["cache"]) if options.get("cache") else None
        told.append(cached_in_few(cache, found["steps"]))
        said = " ".join(f"{one[0].upper()}{one[1:]}." for one in told if one)
        said = html("hint", said) if said else ""
        return {
            self.line: plan_line(found, is_dense=is_dense, compares=self.compares),
            self.small: said,
            **self._own(found, held),
            **self._menu(found, held),
        }

    @property
    def _sized(self) -> dict[str, Component]:
        """Controls that show the model's own value while they are empty, by its name in a plan."""
        names = {**PLANNED, "seconds": "seconds"}
        return {names[name]: part for name, part in self.parts.items() if name in names}

    def _own(self, found: Options, held: Held) -> Held:
        shown = {**found, "seconds": lasting(found)}
        return {
            part: gr.update(placeholder=str(shown[name]))
            for name, part in self._sized.items()
            if held[part] in (None, "")
        }

    def _menu(self, plan: Options, held: Held) -> Held:
        """Return the menu of sizes that a model makes, if it changes by what a plan has found."""
        now, sides = plan["multiples"], [held[self.parts[name]] for name in ("height", "width")]
        chosen, value = held[self.size], _size_of(sides[0], sides[1], now)
        if now == held[self.multiples] and (value == chosen or (chosen, value) == (CUSTOM, "")):
            return {}
        sizes = gr.update(choices=_sizes(held[self.model], now), value=value)
        return {self.size: sizes, self.multiples: now}

    def _listen(self, sized: Sequence[str]) -> None:
        parts = self.parts
        inputs = {name: parts[name] for name in (*INPUTS.values(), "strength")}
        sizes = [parts[name] for name in sized]

        def of_model(model: str) -> Held:
            takes, samples = _inputs(model), _prompts(model)
            takes = (*takes, "strength") if "video" in takes else takes
            shown: Held = {one: gr.update(visible=x in takes) for x, one in inputs.items()}
            shown |= dict.fromkeys(sizes)
            shown |= {self.examples: gr.Dataset(samples=samples), parts["prompt"]: samples[0][0]}
            shown |= {self.size: gr.update(choices=_sizes(model), value=AS_MODEL)}
            shown |= {self.multiples: [*ANY]}
            return {**shown, self.given_files: gr.update(visible=bool(takes))}

        changed = [*inputs.values(), *sizes, self.examples, parts["prompt"]]
        changed += [self.size, self.multiples]
        self.model.input(of_model, [self.model], [*changed, self.given_files], **QUIETLY)
        self.examples.click(lambda one: one[0], [self.examples], [parts["prompt"]], **QUIETLY)

        sides = [parts["height"], parts["width"]]

        self.size.input(None, [self.size, *sides], sides, js=SIDES, **QUIETLY)
        for one in sides:
            one.input(_size_of, [*sides, self.multiples], [self.size], **QUIETLY)
        read = refusing(self.read_clip, self.line)
        self.earlier.upload(read, [self.earlier], [self.line, *self.inputs], **TELLING)

    def _readable(self, files: str | list[str]) -> str | list[str] | None:
        """Return files that this page may read; None for others."""
        try:
            if isinstance(files, list):
                return [str(self.page.places.readable(one)) for one in files]
            return str(self.page.places.readable(files))
        except ValueError:
            return None


def build(page: Page) -> None:
    with gr.Row(elem_classes="ga-columns"):
        with gr.Column(scale=6, min_width=320):
            form = RunForm(
                page,
                "gen",
                many=True,
                start={"preview": PREVIEW},
            )
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="gen-run", scale=2)
                add = gr.Button("Add to queue", elem_id="gen-add", scale=1)
        with gr.Column(scale=7, min_width=320):
            view = follow(page, "gen", kind="generate")
            blank = html("blank", "The video appears")
            result = page.linked(blank, "gen-result", "ga-result")
            reuse = gr.Button("Use these settings", elem_id="gen-reuse", visible=False, size="sm")

    def queued(held: Held) -> QueuedJob:
        return form.submit(held, "generate", json="{job}/result.json")

    def submit(held: Held) -> Held:
        hidden = gr.update(visible=False)
        return {
            view.job: queued(held).id,
            result: html("blank", "The video appears"),
            reuse: hidden,
        }

    def show(name: str) -> Held:
        job = page.find(name)
        if job is None or job.state != DONE:
            return {result: blank, reuse: gr.update(visible=False)}
        return {result: result_box(page, job), reuse: gr.update(visible=True)}

    inputs, shown = {*form.inputs, page.tab}, [result, reuse]
    run.click(refusing(submit, view.error), inputs, [view.error, view.job, *shown], **ADDING)

    def only_queue(held: Held) -> Held:
        queued(held)
        return {view.error: ""}

    add.click(
        refusing(only_queue, view.error), inputs, [view.error], trigger_mode="multiple", **ADDING
    )
    view.ended.change(show, [view.ended], shown, **QUIETLY)
    filled = refusing(lambda name: form.filled(page.queue.job(name).options), view.error)
    reuse.click(filled, [view.ended], [view.error, *form.inputs], **TELLING)
    form.come_back("generate")
    form.watch()


def lasting(found: Options) -> str:
    """Seconds that the clip of a plan lasts; "" if its frames a second are not known."""
    return f"{found['num_frames'] / found['fps']:.1f}" if found["fps"] else ""


def plan_line(found: Options, *, is_dense: bool = False, compares: bool = False) -> str:
    """Say what `--plan --json` forecasts: the clip, speed-up, density, seconds and memory.

    Args:
        is_dense: whether no attention is sparse, so that no speed-up is told.
        compares: whether the clip is made densely too, which takes its time as well.
    """
    frames, lasts = found["num_frames"], lasting(found)
    low, high = (f"{one:.1f}" for one in found["speedup_range"])
    speed = f"{low}x as fast" if low == high else f"{low} to {high}x as fast"
    pays = found["pays"] and found["tokens"] >= LEAST_TOKENS
    attention = {"speed": speed if pays else "no gain at this size"}
    attention |= {"density": f"{found['density']:.2f}"}
    runs = ("sparse_total", "dense_total") if compares else ("sparse_total",)
    seconds = zip(*(found["seconds"][one] for one in runs), strict=True)
    first, last = (duration(sum(one)) for one in seconds)
    peak, memory = found["peak_bytes"][found["offload"]][1], found["device_bytes"]
    facts = {
        "clip": f"{found['width']} x {found['height']}, {frames} frames{lasts and f', {lasts} s'}",
        **({} if is_dense else attention),
        "time": first if first == last else f"{first} to {last}",
        "memory": f"{peak / 1e9:.1f} GB" if peak >= 1e8 else f"{peak / 1e6:.0f} MB",
    }
    if to_fetch := found.get("fetch_bytes"):
        facts["fetches first"] = f"{to_fetch / 1e9:.1f} GB"
    wrong, mode = "", found["fits_with"]
    if found["fits"] is False:
        advice = f"offload {mode} fits" if mode else "ask for fewer frames or pixels"
        wrong = f"does not fit into {memory / 1e9:.0f} GB: {advice}"
    return html("plan", facts, f"on {found['device']}, {found['tokens']:,} tokens", wrong)


def stream_line(found: Options) -> str:
    """Say what `--plan --json` forecasts of a stream: its length, speed, seconds and memory."""
    (low, high), frames = found["frames_per_second"], found["frames"] or found["frames_per_chunk"]
    first, last = (duration(frames * one) for one in found["seconds"]["frame"])
    facts = {
        "stream": f"{frames:,} frames, {found['frames_per_chunk']} a chunk",
        "speed": f"{low:.2g} to {high:.2g} frames a second, plays at {found['fps']:g}",
        "time": first if first == last else f"{first} to {last}",
        "memory": f"{found['peak_bytes'][1] / 1e9:.2g} GB, constant",
    }
    wrong = "does not fit into the memory" if found["fits"] is False else ""
    return html("plan", facts, f"on {found['device']}, {found['keys']:,} keys", wrong)


def title_of(options: Options) -> str:
    """Title of a job of these options."""
    return " ".join(options.get("prompt", ["without a prompt"]))


def result_box(page: Page, job: QueuedJob) -> str:
    """Show the video of a job, and what it was made with."""
    video = next((f for f in page.queue.files(job) if f.suffix == ".mp4"), None)
    if video is None:
        return html("error", "the video is not there any more")
    facts = {"prompt": job.title}
    try:
        made = read_fields(page.queue.place(job) / "result.json")
        density = made["density"]
        facts |= {"seed": str(made["seed"]), "made in": f"{made['seconds']:.1f} s"}
        facts["density"] = "all dense" if density is None else f"{density:.3f} of sparse steps"
        if "cache" in made:
            facts["cache"] = str(made["cache"]).removeprefix("cache ")
    except (OSError, ValueError):  # gone or cut off since: the clip plays without its figures
        pass
    warnings = [line for line in job.notes if "warning" in line]
    rules = [line for line in warnings if BY_RULE in line]
    others = [line for line in warnings if BY_RULE not in line]
    command = command_line(job.verb, job.options)
    return html("clip", page.url(job, video), facts, bool(rules), others, command)


def _sizes(model: str, multiples: Sequence[int] = ANY) -> list[tuple[str, str]]:
    """Choices of a size; the embedded model knows its own alone."""
    known = {} if model == NAME else menu_of(multiples)
    named = [(f"{words} ({size.replace('x', ' x ')})", size) for words, size in known.items()]
    return [("model's own", AS_MODEL), *named, ("custom", CUSTOM)]


def menu_of(multiples: Sequence[int]) -> dict[str, str]:
    """Sizes of the menu, each side the nearest multiple, of two the smaller.

    Args:
        multiples: pixels that divide the height and the width.
    """
    found = {}
    for words, size in MENU.items():
        sides = zip(map(int, size.split("x")), reversed(multiples), strict=True)
        near = ((2 * side - 1 + step) // (2 * step) * step for side, step in sides)
        found[words] = "x".join(map(str, near))
    return found


def _size_of(height: object, width: object, multiples: Sequence[int]) -> str:
    """Choice of the size that is entered."""
    if height in (None, "") and width in (None, ""):
        return AS_MODEL
    size = f"{width}x{height}"
    return size if size in menu_of(multiples).values() else CUSTOM


def _inputs(model: str) -> tuple[str, ...]:
    """Options for pictures and video that a model takes; of one on the hub, all.

    The files of a model on the hub are not here to tell.
    """
    if model == NAME:
        return ()
    folder = expanded(model) if model else Path()
    if index_in(folder) is None:
        return tuple(INPUTS.values())

    return tuple(
        name
        for kind, name in INPUTS.items()
        if _makes_from(folder, kind) or _makes_from(folder, FIRST, kind)
    )


def _waits(model: str) -> bool:
    """Whether the model in a folder makes no video from text alone."""
    folder = expanded(model) if model and model != NAME else Path()
    return index_in(folder) is not None and not _makes_from(folder)


def _makes_from(folder: Path, *kinds: str) -> bool:
    try:
        choose_in(folder, kinds)
    except ValueError:
        return False
    return True


def tab_of() -> gr.Tab:
    """The tab that is being built."""
    block = Context.block
    while not isinstance(block, gr.Tab):
        assert block is not None
        block = block.parent
    return block


def _prompts(model: str) -> list[list[str]]:
    return [[one] for one in PROMPTS.get(model, PROMPTS[""])]
