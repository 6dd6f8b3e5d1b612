"""Page of a training, `OUT/report.html`: curves, samples, and the command that uses the result.

The page is one file without a script, and nothing is fetched. The videos lie beside it and are
named by relative paths.
"""

import base64
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.attention_processors.attached.recipe import Recipe
from gen_accel.files import replacing
from gen_accel.lora.caching.inputs import FIRST_FRAME
from gen_accel.lora.card import example_prompt
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.curves import Chart, Line, draw_chart, running_mean
from gen_accel.lora.experts import BOTH, PARTS
from gen_accel.lora.fixed_loss import Figures
from gen_accel.lora.progress import STEADY
from gen_accel.lora.validate import BESIDE, FOLDER, STRIP, read_numbers
from gen_accel.measure.report import template

REPORT, METRICS, LOGS = "report.html", "metrics.jsonl", "logs"
TEMPLATE = "report.html.j2"  # beside this module
ENDS = 20  # steps whose mean is the loss at an end of a training without losses at fixed noise
MOST_ROWS = 12  # steps in the grid of samples


class Tile(NamedTuple):
    """A headline figure."""

    name: str
    figure: str
    meaning: str


class Row(NamedTuple):
    """A step's frames of one prompt, as a data URL."""

    step: int
    picture: str


class Table(NamedTuple):
    """Losses at fixed noise: a record for each row, a noise level for each column."""

    title: str
    levels: list[str]
    records: list[dict[str, Any]]


class Sample(NamedTuple):
    """What was sampled of one prompt.

    Args:
        frames: numbers of the frames that the rows show.
        video: path of the newest video.
        is_beside: whether it shows step 0 too.
        videos: step and path of all videos.
    """

    prompt: str
    rows: list[Row]
    frames: list[int]
    video: str
    is_beside: bool
    step: int
    videos: list[tuple[int, str]]


class Page:
    """The page of one run, which is written again whenever there is something new.

    Args:
        shown: whether this process writes it.

    Attributes:
        records: losses at fixed noise so far, as `metrics.jsonl` has them, without their times.
    """

    def __init__(self, out: Path, config: TrainConfig, recipe: Recipe, *, shown: bool) -> None:
        self.out, self.config, self.recipe, self._shown = out, config, recipe, shown
        self.records: list[dict[str, Any]] = []
        if shown:
            _, told = read_metrics(out / METRICS)
            self.records = [{k: x for k, x in one.items() if k != "seconds"} for one in told]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Write the page also where the training ends by an error."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # the training's own error is raised
                self.write(None, state=str(error) or type(error).__name__, is_faulty=True)
            raise

    def write(
        self, done: int | None, *, state: str = "under way", is_faulty: bool = False
    ) -> None:
        """Write the page after `done` steps; None where the metrics say how many there were."""
        if not self._shown:
            return
        steps, _ = read_metrics(self.out / METRICS)
        count = done
        if count is None:
            count = steps[-1]["step"] + 1 if steps else 0
        page = template(Path(__file__).with_name(TEMPLATE), extra="train")
        text = page.render(**self._facts(steps, count), state=state, is_faulty=is_faulty)
        with replacing(self.out / REPORT) as partial:
            partial.write_text(text, encoding="utf-8")

    def end(self, done: int, folder: Path | None) -> tuple[str, ...]:
        """Write the page of a training that is complete, or was stopped; return its last lines."""
        if not self._shown:
            return ()
        is_stopped = folder is None
        self.write(done, state="stopped, --resume goes on" if is_stopped else "complete")
        steps, _ = read_metrics(self.out / METRICS)
        lines = [self.fixed_words() or loss_words(steps)]
        if (self.out / FOLDER).is_dir():
            lines.append(f"videos: {self.out / FOLDER}")
        lines.append(f"report: {self.out / REPORT}")
        if self.config.log_with == "tensorboard":
            lines.append(f"curves: tensorboard --logdir {shlex.quote(str(self.out / LOGS))}")
        if folder is not None:
            lines.append(f"use it: {use_of(self.config, self.recipe, folder)}")
        return tuple(line for line in lines if line)

    def fixed_words(self) -> str:
        """Say how the loss at fixed noise went, as "held-out loss 0.412 -> 0.318"."""
        return ", ".join(filter(None, (self._fixed_words(part) for part in self._parts)))

    def _fixed_words(self, part: str | None) -> str:
        alike = self._alike(part)
        if not alike:
            return ""
        name = "held-out loss" if alike[-1]["held_out"] else "loss at fixed noise"
        name = _of_part(name, part)
        first, last = (f"{one['fixed_loss']:.4g}" for one in (alike[0], alike[-1]))
        return f"{name} {first}" if len(alike) == 1 else f"{name} {first} -> {last}"

    @property
    def _parts(self) -> tuple[str | None, ...]:
        """The experts that train, or None alone for one transformer."""
        return (None,) if self.config.part != BOTH else PARTS

    def _alike(self, part: str | None = None) -> list[dict[str, Any]]:
        """Records of the same clips, lengths and levels as the newest, of one expert where two
        train."""
        records = [one for one in self.records if one.get("part") == part]
        return [one for one in records if _about(one) == _about(records[-1])]

    def _facts(self, steps: list[dict[str, Any]], done: int) -> dict[str, Any]:
        config = self.config
        return {
            "title": f"Training of {self.out.name}",
            "tiles": [*self._tiles(steps, done)],
            "charts": self._charts(steps, done),
            "tables": [*self._tables()],
            "samples": self._samples(),
            "use": use_of(config, self.recipe, self._result()),
            "fields": [*self._fields()],
        }

    def _tables(self) -> Iterator[Table]:
        name = "Held-out loss" if self.config.held_out else "Loss at fixed noise"
        for part in self._parts:
            alike = self._alike(part)
            if len(alike) > 1:
                rows = _spread(alike, MOST_ROWS)
                yield Table(f"{_of_part(name, part)} by noise level", [*rows[-1]["levels"]], rows)

    def _result(self) -> Path:
        """Folder of the adapter: the final one, or else the newest checkpoint's."""
        name = "lora" if self.config.adapter == "lora" else "image_prompt"
        final = self.out / name
        saved = _of_steps(self.out / "checkpoints", name)
        return final if final.is_dir() or not saved else saved[-1]

    def _tiles(self, steps: list[dict[str, Any]], done: int) -> Iterator[Tile]:
        yield Tile("Steps", f"{done} of {self.config.total_steps}", " ".join(self.config.stages))
        for part in self._parts:
            if len(alike := self._alike(part)) < 2:
                continue
            first, last = alike[0], alike[-1]
            change = last["fixed_loss"] / first["fixed_loss"] - 1
            clips = "clips that never train" if last["held_out"] else "clips that train"
            yield Tile(
                _of_part("Held-out loss" if last["held_out"] else "Loss at fixed noise", part),
                f"{last['fixed_loss']:.4g}",
                f"{change:+.1%} since step {first['after']}, {last['clips']} {clips}",
            )
        for part in self._parts:
            if losses := [one["loss"] for one in _of(steps, part)]:
                yield Tile(
                    _of_part("Loss", part),
                    f"{running_mean(losses, STEADY)[-1]:.4g}",
                    "running mean; the noise level that a step draws decides most of it",
                )
        if steps:
            recent = sorted(one["seconds"] for one in steps[-ENDS:])
            batch = self.recipe.batch or 1
            yield Tile(
                "A step",
                f"{recent[len(recent) // 2]:.3g} s",
                f"{batch} clip{'s' if batch > 1 else ''} each, {done * batch} shown so far, "
                f"{self.recipe.clips} in the cache",
            )
            peak = max((one.get("memory_gb", 0.0) for one in steps), default=0.0)
            if peak:
                yield Tile("Memory", f"{peak:.3g} GB", "the most so far, of the first process")

    def _charts(self, steps: list[dict[str, Any]], done: int) -> list[Chart]:
        stages, first = [], 0
        for stage in self.config.curriculum:
            stages.append((first, f"{stage.frames} frames"))
            first += stage.steps
        about: dict[str, Any] = {"steps": done, "stages": stages}
        drawn = [
            *(self._loss_chart(_of(steps, part), part, about) for part in self._parts),
            *(self._fixed_chart(part, about) for part in self._parts),
            draw_chart(
                "Learning rate", self._lines(steps, "learning_rate"), from_zero=True, **about
            ),
            draw_chart("Gradient norm", self._lines(steps, "grad_norm"), **about),
            draw_chart(
                "Seconds a step",
                [Line("", _points(steps, "seconds"), "main")],
                unit="s",
                from_zero=True,
                **about,
            ),
            draw_chart(
                "Memory",
                [Line("", _points(steps, "memory_gb"), "main")],
                unit="GB",
                from_zero=True,
                **about,
            ),
        ]
        return [chart for chart in drawn if chart is not None]

    def _loss_chart(
        self, steps: list[dict[str, Any]], part: str | None, about: dict[str, Any]
    ) -> Chart | None:
        raw = _points(steps, "loss")
        smooth = running_mean([y for _, y in raw], STEADY)
        means = [(x, y) for (x, _), y in zip(raw, smooth, strict=True)]
        lines = [Line("each step", raw, "faint"), Line("running mean", means, "main")]
        return draw_chart(_of_part("Loss", part), lines, **about)

    def _fixed_chart(self, part: str | None, about: dict[str, Any]) -> Chart | None:
        alike = self._alike(part)
        kind = "Held-out loss" if self.config.held_out else "Loss at fixed noise"
        mean = Line(f"{kind}, mean", [(r["after"], r["fixed_loss"]) for r in alike], "fixed", True)
        levels = [
            Line(
                f"at noise {x}", [(r["after"], r["levels"][x]) for r in alike], f"level-{i}", True
            )
            for i, x in enumerate(alike[-1]["levels"] if alike else [])
        ]
        return draw_chart(_of_part(kind, part), [*levels, mean], mark=mean, **about)

    def _lines(self, steps: list[dict[str, Any]], name: str) -> list[Line]:
        """A curve for each expert where two train."""
        styles = zip(self._parts, ("main", "fixed"), strict=False)
        return [Line(part or "", _points(_of(steps, part), name), s) for part, s in styles]

    def _samples(self) -> list[Sample]:
        found = []
        for i, prompt in enumerate(self.config.validation_prompts):
            videos = _of_steps(self.out / FOLDER, f"{i:02d}.mp4")
            if not videos:
                continue
            strips = _of_steps(self.out / FOLDER, f"{i:02d}{STRIP}")
            numbers = read_numbers(strips[-1]) if strips else []
            strips = [path for path in strips if read_numbers(path) == numbers]
            newest = videos[-1]
            beside = newest.with_name(f"{i:02d}{BESIDE}")
            found.append(
                Sample(
                    prompt=prompt,
                    rows=[Row(_step_of(one), _picture(one)) for one in _spread(strips, MOST_ROWS)],
                    frames=numbers,
                    video=self._relative(beside if beside.is_file() else newest),
                    is_beside=beside.is_file(),
                    step=_step_of(newest),
                    videos=[(_step_of(path), self._relative(path)) for path in videos],
                )
            )
        return found

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def _fields(self) -> Iterator[tuple[str, str, bool]]:
        """Name and value of each field of the config, and whether it is not the default."""
        for one in fields(self.config):
            value = getattr(self.config, one.name)
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield one.name, text.lower() if value is None else text, self.config.is_given(one.name)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the lines of steps, and the lines of losses at fixed noise; half a line is left out."""
    steps, fixed = [], []
    if not path.is_file():
        return [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            told = json.loads(line)
            (steps if "step" in told else fixed).append(told)
        except (ValueError, TypeError):
            continue
    return steps, fixed


def record_of(figures: Figures) -> dict[str, Any]:
    """Return the line of `metrics.jsonl` for losses at fixed noise."""
    return {
        "after": figures.after,
        "fixed_loss": figures.mean,
        "levels": figures.levels,
        "clips": figures.clips,
        "frames": figures.frames,
        "held_out": figures.is_held_out,
    }


def loss_words(steps: Sequence[Mapping[str, Any]]) -> str:
    """Say how the loss went, by the means at both ends; "" for less than two steps."""
    losses = [one["loss"] for one in steps]
    count = min(ENDS, len(losses) // 2)
    if not count:
        return ""
    first, last = (math.fsum(part) / count for part in (losses[:count], losses[-count:]))
    of = f"means of {count} steps" if count > 1 else "of two steps"
    return f"loss {first:.4g} -> {last:.4g}, {of}"


def use_of(config: TrainConfig, recipe: Recipe, folder: Path) -> str:
    """Return the command that generates with an adapter, or Python where no verb loads it."""
    prompt = next(iter(config.validation_prompts), example_prompt(recipe))
    if config.part == "transformer_2":
        return (
            f'pipe.load_lora_weights("{folder}", load_into_transformer_2=True); '
            f'gen_accel.attach(pipe, from_lora="{folder}")'
        )
    given = ["gen-accel", "generate", "--model", config.model, "--prompt", prompt]
    frames = config.longest
    if config.adapter == "lora":
        given += ["--from-lora", str(folder)]
        if recipe.condition == FIRST_FRAME:
            given += ["--image", next(iter(config.validation_images), "first.png")]
    else:
        image = next(iter(config.validation_images), "image.png")
        given += ["--image-prompt", image, "--image-adapter", str(folder)]
        frames = max(frames, recipe.trained_frames or 0)
    size = {"frames": frames, "height": config.height, "width": config.width}
    for name, value in size.items():
        given += [f"--{name}", str(value)]
    return shlex.join([*given, "--out", "video.mp4"])


def _of_part(name: str, part: str | None) -> str:
    return name if part is None else f"{name} of {part}"


def _of(steps: Sequence[dict[str, Any]], part: str | None) -> list[dict[str, Any]]:
    """Select the steps of one expert; all where part is None."""
    return [one for one in steps if part is None or one.get("part") == part]


def _points(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(one["step"] + 1, float(one.get(name, math.nan))) for one in steps]


def _about(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["clips"], record["frames"], record["held_out"], tuple(record["levels"])


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _of_steps(folder: Path, name: str) -> list[Path]:
    """Find what is called `name` in the folders of steps, by the number of the step."""
    found = folder.glob(f"step-*/{name}")
    own = [path for path in found if path.parent.name.removeprefix("step-").isdigit()]
    return sorted(own, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.parent.name.removeprefix("step-"))


def _picture(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
