"""The plan of a training as lines for a terminal."""

import textwrap
from collections.abc import Iterator

from gen_accel.lora.training_plan import Stage, TrainingPlan, Verdict
from gen_accel.measure.cards import Range
from gen_accel.measure.forecast_words import WIDTH, duration, gigabytes

NAME, CELL = 26, 17  # characters of a table's columns
PARTS = {
    "weights": "weights",
    "adapter": "LoRA, optimizer, gradients",
    "kept": "kept of other blocks",
    "block": "one block at work",
    "outside": "batch, embeddings, loss",
}


def training_lines(plan: TrainingPlan, width: int = WIDTH) -> list[str]:
    """Say what a training needs and whether it fits, in lines of at most `width` characters."""
    lines: list[str] = []
    for text in (*_head(plan), "", *_stages(plan, width), *_others(plan), "", *_verdicts(plan)):
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(
            text, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False
        ) or [""]
    return lines


def _head(plan: TrainingPlan) -> Iterator[str]:
    setting = plan.setting
    options = [f"gradient_checkpointing {setting.checkpointing}"]
    options += [f"base {setting.base}"] if setting.base else []
    options += [f"blocks_to_swap {setting.swap}"] if setting.swap else []
    options += ["checkpoint_parts"] if setting.parts else []
    yield f"{plan.model}: {plan.trainable / 1e6:,.1f} million parameters train"
    yield ", ".join([*options, f"optimizer {setting.optimizer}"])


def _stages(plan: TrainingPlan, width: int) -> Iterator[str]:
    """A table of the stages, as many beside each other as there is room for."""
    room = max(1, (width - NAME - 2) // CELL)
    for first in range(0, len(plan.stages), room):
        some = plan.stages[first : first + room]
        yield from _table(some, plan)


def _table(stages: tuple[Stage, ...], plan: TrainingPlan) -> Iterator[str]:
    yield _row("GB a stage", [f"{stage.frames} frames" for stage in stages])
    if len({(stage.height, stage.width) for stage in plan.stages}) > 1:
        yield _row("", [f"{stage.height} x {stage.width}" for stage in stages])
    yield _row("tokens of a clip", [f"{stage.tokens:,}" for stage in stages])
    for name, words in PARTS.items():
        yield _row(words, [_gb(getattr(stage.memory, name)) for stage in stages])
    yield _row("on the device at most", [_gb(stage.memory.total) for stage in stages])
    if any(stage.memory.host for stage in stages):
        yield _row("waiting in CPU memory", [_gb(stage.memory.host) for stage in stages])
    for device in stages[0].seconds:
        yield f"  a step, {device}:"
        yield _row("", [duration(stage.seconds[device]) for stage in stages])
    yield ""


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _others(plan: TrainingPlan) -> Iterator[str]:
    if plan.sampling is not None:
        decoded = "not known" if plan.decoding is None else gigabytes(plan.decoding)
        yield f"validation: sampling {gigabytes(plan.sampling)}, decoding {decoded}"
    cached = "not known" if plan.caching is None else gigabytes(plan.caching)
    yield f"caching, before the training: {cached}"
    yield f"CPU memory while the pipeline is loaded: {gigabytes(plan.loading)}"


def _verdicts(plan: TrainingPlan) -> Iterator[str]:
    for one in plan.verdicts:
        yield verdict(one, plan)
    if plan.verdicts:
        yield ""
    yield "Seconds: " + "; ".join(dict.fromkeys(one.rates_from for one in plan.verdicts)) + "."
    for kind in plan.without_parts:
        yield (
            f"checkpoint_parts: {kind} is computed again as a whole, as it has linear layers "
            "beside its attention and feed-forward"
        )
    for note in plan.notes:
        yield f"not counted: {note}"


def verdict(one: Verdict, plan: TrainingPlan) -> str:
    """Say whether a training fits a device, and what to turn on if it does not."""
    hours = f"{_hours(one.hours)} in all"
    if one.memory is None:
        return f"{one.device}: at most {gigabytes(one.peak)} ({one.moment}); {hours}"
    place = gigabytes(one.memory).replace(".0 ", " ")
    if one.fits:
        return f"{one.device}: fits in {place}: yes, {gigabytes(one.peak)}; {hours}"
    said = f"{one.device}: fits in {place}: no, {gigabytes(one.peak)} ({one.moment})"
    advice = one.advice
    if advice is None:
        return said
    steps = [
        f"{change}: {gigabytes(size)}"
        for change, size in zip(advice.changes, advice.totals, strict=True)
    ]
    if advice.fits:
        return f"{said}. Turn on: " + ", then ".join(steps) + f", which fits; {hours}"
    tried = f"; with {', '.join(steps)}" if steps else ""
    smaller = [f"stages of at most {advice.frames} frames"] if advice.frames else []
    smaller += [f"{advice.sides[0]} x {advice.sides[1]} pixels"] if advice.sides else []
    if smaller:
        so = "still no. With all of them it fits" if steps else "it fits"
        return f"{said}{tried}: {so} with {' or '.join(smaller)}"
    return f"{said}{tried}: still no, at any length: lower height and width"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"


def _hours(hours: Range) -> str:
    return duration(Range(3600 * hours.low, 3600 * hours.high, hours.source))
