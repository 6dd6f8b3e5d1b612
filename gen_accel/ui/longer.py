"""The screen Longer: videos several times as long as a model was trained on."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from gen_accel import demo
from gen_accel.names import METHODS, PRESETS, TECHNIQUES
from gen_accel.ui import lengths
from gen_accel.ui.lengths import Held
from gen_accel.ui.page import PRIVATELY, QUIETLY, Page, error_box, follow, refusing
from gen_accel.ui.plan_line import plan_line
from gen_accel.ui.queue import DONE
from gen_accel.ui.run_parts import OWN, options_of, run_parts, whole
from gen_accel.ui.tables import CSS, charted, hint, json_link, note, table, video

NO_LORA = "none"
TIMES = 4  # of the trained length, at first
STEP = 4  # frames between two lengths of the slider
WHAT = (
    "Beyond the length that it was trained on, a model repeats itself, freezes or drifts. These "
    "techniques help without training; a LoRA that was trained at the new length helps most."
)


def build(page: Page) -> None:
    gr.HTML(hint(WHAT), css_template=CSS)
    own = demo.TRAINED_FRAMES
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            frames = gr.Slider(
                own,
                lengths.longest(own),
                TIMES * (own - 1) + 1,
                step=STEP,
                label="Frames",
                info=f"The model was trained on {own}.",
                elem_id="long-frames",
                render=False,
            )
            parts = run_parts(
                page, "long", frames=frames, settings=(OWN, *PRESETS[::-1]), methods=METHODS
            )
            trained = gr.Number(
                own, label="Trained on, frames", precision=0, elem_id="long-trained"
            )
            lora = gr.Dropdown(
                [NO_LORA],
                value=NO_LORA,
                label="LoRA for longer video",
                info="Brings its own attention and techniques.",
                elem_id="long-lora",
            )
            gr.Markdown("**Techniques**")
            with gr.Group():
                boxes = {
                    name: gr.Checkbox(False, label=name, elem_id=f"long-technique-{name}")
                    for name in TECHNIQUES
                }
            settings = gr.Textbox(
                label="Their settings",
                placeholder="fresh_noise:shift=22",
                info="Several with a comma between. Without: their defaults.",
                elem_id="long-settings-of",
            )
            effect = gr.HTML(elem_id="long-effect", css_template=CSS)
            plan = gr.HTML(elem_id="long-plan")
            run = gr.Button("Make it longer", variant="primary", elem_id="long-run")
        with gr.Column(scale=7, min_width=300):
            view = follow(page, "long", kind="longer")
            film = gr.HTML(elem_id="long-video", css_template=CSS)
            figures = gr.HTML(elem_id="long-figures", css_template=CSS)
            with gr.Column(visible=False, elem_id="long-charts") as charts:
                with gr.Row():
                    loop = gr.LinePlot(
                        x="frames apart",
                        y="similarity",
                        title="Does it repeat?",
                        height=240,
                        min_width=280,
                        elem_id="long-loop",
                    )
                    drift = gr.LinePlot(
                        x="frame",
                        y="drift",
                        color="of",
                        title="Does it drift from its first frame?",
                        color_map=dict(
                            zip(
                                lengths.CHANNELS,
                                ("#dc2626", "#16a34a", "#2563eb", "#6b7280"),
                                strict=True,
                            )
                        ),
                        height=240,
                        min_width=280,
                        elem_id="long-drift",
                    )
                sheet = gr.Image(
                    label="The whole clip at a glance", interactive=False, elem_id="long-sheet"
                )
    loaded = gr.State("")

    def chosen_of(*ticks: bool) -> list[str]:
        return [name for name, tick in zip(TECHNIQUES, ticks, strict=True) if tick]

    def asked(*values: Any) -> dict[str, Any]:
        """Options of `gen-accel generate` that all inputs come to."""
        *run, trained, lora, settings, _ = values[: len(every)]
        ticks = values[len(every) :]
        options = options_of(run)
        chosen = lengths.with_settings(chosen_of(*ticks), settings or "")
        if lora != NO_LORA:
            for name in ("method", "set", "dense_start"):
                options.pop(name, None)
            options["from_lora"] = lora
        options["extend"] = ",".join(chosen) or "none"
        if chosen:
            options["trained_frames"] = whole(trained)
        return options

    def submit(*values: Any) -> Any:
        options, tab = asked(*values), values[len(every) - 1]
        about = {"title": f"{options['prompt'][0]}, {options['frames']} frames"}
        options |= {"out": "{job}/video.mp4"}
        kept = {"trained": whole(values[len(parts.inputs)])}
        return page.submit("generate", options, tab=tab, kind="longer", about=kept, **about).id

    def look(model: str, frames: float, trained: float, settings: str, *ticks: bool) -> Any:
        """Say what goes with the chosen techniques, and what they do."""
        chosen = chosen_of(*ticks)
        try:
            with_values = lengths.with_settings(chosen, settings or "")
            options = {"model": model, "frames": whole(frames), "trained_frames": whole(trained)}
            options["extend"] = ",".join(with_values) or None
            answer = page.questions.known("techniques", options)
        except ValueError as error:
            return [error_box(error), *[gr.skip()] * len(boxes)]
        refused, does = lengths.refused(answer), lengths.does(answer)
        found = [
            gr.update(
                interactive=name not in refused,
                info=f"{does[name]} Not now: {refused[name]}." if name in refused else does[name],
            )
            for name in TECHNIQUES
        ]
        return [note(*lengths.effects(answer)), *found]

    def expect(*values: Any) -> str:
        try:
            [found] = page.questions.known("generate", asked(*values) | {"plan": True})
        except ValueError as error:
            return error_box(error)
        longer = whole(values[len(parts.inputs)]) or 0
        times = found["num_frames"] / max(longer, 1)
        return plan_line(found) + hint(f"{times:.1f} times as long as the model was trained on")

    def of_model(model: str) -> Any:
        """The length that a model was trained on, and a slider for it."""
        try:
            known = page.questions.known("techniques", {"model": model})["trained_frames"]
        except ValueError as error:
            return [error_box(error), gr.skip(), gr.skip()]
        most = lengths.longest(known)
        value = min(TIMES * (known - 1) + 1, most)
        told = f"The model was trained on {known}."
        return [
            "",
            known,
            gr.update(minimum=known, maximum=most, value=value, info=told),
        ]

    def of_lora(folder: str) -> Any:
        """The techniques of a LoRA, ticked, and the length that it counts from."""
        held = {str(one.folder): one for one in _loras(page)}.get(folder)
        free = gr.update(interactive=held is None)
        if held is None:
            return [gr.skip(), "", free, *[False] * len(boxes)]
        names = {one.partition(":")[0] for one in held.techniques}
        settings = ",".join(one for one in held.techniques if ":" in one)
        return [held.trained_frames, settings, free, *[name in names for name in TECHNIQUES]]

    def listed(before: str) -> Any:
        if before:
            return [gr.skip(), before]
        choices = [("none", NO_LORA), *((one.words, str(one.folder)) for one in _loras(page))]
        return [gr.update(choices=choices), "listed"]

    def show(name: str) -> Any:
        job = page.queue.job(name)
        nothing = [gr.skip()] * 6
        if job.state != DONE:
            return nothing
        place = page.queue.store.place(job) / "video.mp4"
        lag = job.about.get("trained")
        options = {"videos": [str(place)], "by_frame": True}
        length = job.options.get("frames") or 0
        if isinstance(lag, int) and lag < length:
            options["lag"] = lag
        try:
            found = page.questions.ask("metrics", options)
        except ValueError as error:
            return [error_box(error), *nothing[1:]]
        course = found.pop("by_frame")
        rows = lengths.motion_words(found, lag)
        saved = json_link("Figures (JSON)", found, "metrics.json")
        return [
            video(page.url(job, "video.mp4"), job.title),
            table(("over time", "value", "what it says"), rows) + saved,
            gr.update(visible=True),
            charted(lengths.loop_table(course)),
            charted(lengths.drift_table(course)),
            lengths.sheet_of({job.title: place}),
        ]

    every = [*parts.inputs, trained, lora, settings, page.tab]
    ticks = [*boxes.values()]
    run.click(refusing(submit, 1), [*every, *ticks], [view.error, view.job], **PRIVATELY)
    what = [parts.model, frames, trained, settings, *ticks]
    looked = [effect, *ticks]
    screen: Any = Context.block  # the tab that this is built in
    gr.on(
        [screen.select, frames.change, trained.change, settings.blur]
        + [one.input for one in ticks],
        look,
        what,
        looked,
        trigger_mode="always_last",
        show_progress="hidden",
        **PRIVATELY,
    )
    gr.on(
        [*(one.change for one in (*parts.heavy, lora)), *(one.input for one in ticks)],
        expect,
        [*every, *ticks],
        [plan],
        trigger_mode="always_last",
        show_progress="hidden",
        **PRIVATELY,
    )
    parts.model.change(of_model, [parts.model], [view.error, trained, frames], **PRIVATELY).then(
        look, what, looked, **PRIVATELY
    )
    lora.change(of_lora, [lora], [trained, settings, parts.setting, *ticks], **PRIVATELY).then(
        look, what, looked, **PRIVATELY
    )
    page.tab.change(listed, [loaded], [lora, loaded], **QUIETLY)
    results = [film, figures, charts, loop, drift, sheet]
    view.ended.change(show, [view.ended], results, **PRIVATELY)


def _loras(page: Page) -> list[Held]:
    """LoRAs of this page's folders, and the embedded ones."""
    folders: list[Path] = [Path(demo.__file__).parent, *page.places.read, page.places.folder]
    return lengths.loras_in(folders)
