"""Page of a training, `OUT/report.html`: its state, samples, and the command that uses the result.

The page is one file without a script. Frames lie inside, videos beside it by relative paths.
Curves are in `OUT/logs`, for TensorBoard, and in `OUT/metrics.jsonl`.
"""

import json
import math
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from gen_accel.attention_processors.attached.recipe import Recipe
from gen_accel.io import read_json, replacing
from gen_accel.lora.caching.inputs import CONTROL, FIRST_FRAME, LAST_FRAME
from gen_accel.lora.caching.preview import evenly
from gen_accel.lora.config import CHECKPOINTS, LOGS, TrainConfig, print_config
from gen_accel.lora.evaluate import ASKED, BESIDE, FOLDER, STRIP
from gen_accel.lora.publish import example_prompt
from gen_accel.measure.report import template

REPORT, METRICS = "report.html", "metrics.jsonl"
ENDS = 20  # steps whose mean is the loss at an end of a training
MOST_ROWS = 12  # steps in the grid of samples
STREAMED = 1000  # frames of a stream to try

Record = dict[str, Any]  # a line of `metrics.jsonl`


class TrainingPage:
    """Page of one run, which is written again when there is something new.

    Args:
        epoch: words for the epoch that some steps have come to.
        shown: whether this process writes it.

    Attributes:
        records: losses at fixed noise so far, as `metrics.jsonl` has them, without their times.
    """

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        recipe: Recipe,
        *,
        epoch: Callable[[int], str],
        shown: bool,
    ) -> None:
        self.out, self.config, self.recipe, self._shown = out, config, recipe, shown
        self._epoch = epoch
        _, fixed = read_metrics(out / METRICS) if shown else ([], [])
        self.records = [{k: x for k, x in one.items() if k != "seconds"} for one in fixed]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Write the page also if the training ends by an error."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # the training's own error is raised
                self.write(None, state=str(error) or type(error).__name__, is_faulty=True)
            raise

    def write(
        self, done: int | None, *, state: str = "under way", is_faulty: bool = False
    ) -> None:
        """Write the page after `done` steps; None reads their number from the metrics."""
        if not self._shown:
            return
        steps, _ = read_metrics(self.out / METRICS)
        if done is None:
            done = int(steps[-1]["step"]) + 1 if steps else 0
        seconds = [one["seconds"] for one in steps[-ENDS:]]
        peak = max((one.get("memory_gb", 0.0) for one in steps), default=0.0)
        figures = {
            "steps": f"{done} of {self.config.total_steps}, {' '.join(self.config.stages)}, "
            f"{self._epoch(done)}",
            "loss": loss_words(steps),
            "loss of fixed clips": self.fixed_words(),
            "seconds a step": f"{median(seconds):.3g}" if seconds else "",
            "clips": f"{done * (self.recipe.batch or 1)} shown, {self.recipe.clips} in the cache",
            "most memory of the first process": f"{peak:.3g} GB" if peak else "",
        }
        name = "lora" if self.config.adapter == "lora" else "image_prompt"
        result = self.out / name
        if not result.is_dir():
            result = [result, *_of_steps(self.out / CHECKPOINTS, name).values()][-1]
        text = template(Path(__file__).with_name("report.html.j2"), extra="train").render(
            title=f"Training of {self.out.name}",
            state=state,
            is_faulty=is_faulty,
            figures={name: words for name, words in figures.items() if words},
            samples=self._samples(),
            use=use_of(self.config, self.recipe, result),
            config=print_config(self.config),
        )
        with replacing(self.out / REPORT) as partial:
            partial.write_text(text, encoding="utf-8")

    def end(self, done: int, folder: Path | None) -> tuple[str, ...]:
        """Write the page of a training that is complete, or was stopped; return its last lines."""
        if not self._shown:
            return ()
        self.write(done, state="complete" if folder else "stopped, --resume goes on")
        lines = [self.fixed_words() or loss_words(read_metrics(self.out / METRICS)[0])]
        if (self.out / FOLDER).is_dir():
            lines.append(f"videos: {self.out / FOLDER}")
        lines.append(f"report: {self.out / REPORT}")
        if self.config.tracker == "tensorboard":
            lines.append(f"curves: tensorboard --logdir {shlex.quote(str(self.out / LOGS))}")
        if folder is not None:
            lines.append(f"use it: {use_of(self.config, self.recipe, folder)}")
        return tuple(filter(None, lines))

    def fixed_words(self) -> str:
        """Say how the loss at fixed noise went, as "held-out loss 0.412 -> 0.318", from the first
        record of the same clips, lengths and levels as the newest."""
        if not self.records:
            return ""
        same = [[x["clips"], x["frames"], x["held_out"], [*x["levels"]]] for x in self.records]
        last, first = self.records[-1], self.records[same.index(same[-1])]
        name = "held-out loss" if last["held_out"] else "loss at fixed noise"
        words = f"{name} {first['fixed_loss']:.4g}"
        return words if first is last else f"{words} -> {last['fixed_loss']:.4g}"

    def _samples(self) -> Iterator[dict[str, object]]:
        """Yield what this run and earlier ones sampled of each prompt: frames of some steps, and
        all videos."""
        told = self.out / FOLDER / ASKED
        prompts = read_json(told) if told.is_file() else []
        for i, prompt in enumerate(prompts if isinstance(prompts, list) else []):
            if not (videos := _of_steps(self.out / FOLDER, f"{i:02d}.mp4")):
                continue
            strips = [*_of_steps(self.out / FOLDER, f"{i:02d}{STRIP}").items()]
            [*_, last] = videos.values()
            beside = last.with_name(f"{i:02d}{BESIDE}")
            shown = beside if beside.is_file() else last
            rows = (strips[n] for n in evenly(len(strips), MOST_ROWS))
            yield {
                "prompt": prompt,
                "rows": [(step, b64encode(path.read_bytes()).decode()) for step, path in rows],
                "video": shown.relative_to(self.out).as_posix(),
                "is_beside": shown is beside,
                "videos": [(n, p.relative_to(self.out).as_posix()) for n, p in videos.items()],
            }


def read_lines(path: Path) -> list[Record]:
    """Read the lines of a run's metrics; half a line is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            if isinstance(told := json.loads(line), dict) and {"step", "after"} & told.keys():
                found.append(told)
    return found


def read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """Read the lines of steps, and the lines of losses at fixed noise."""
    lines = read_lines(path)
    return [x for x in lines if "step" in x], [x for x in lines if "step" not in x]


def cut_metrics(path: Path, steps: int) -> None:
    """Drop the lines of steps that will run again, losses after them, and half lines."""
    if not path.exists():
        return
    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        for one in read_lines(path):
            if one["step"] < steps if "step" in one else one["after"] <= steps:
                file.write(f"{json.dumps(one)}\n")


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
    """Return the command that generates with an adapter, or Python if no verb loads it."""
    if config.part == "transformer_2":
        return (
            f'pipe.load_lora_weights("{folder}", load_into_transformer_2=True); '
            f'gen_accel.attach(pipe, from_lora="{folder}")'
        )
    prompt = next(iter(config.validation_prompts), example_prompt(recipe))
    image, frames = next(iter(config.validation_images), None), config.longest
    given: dict[str, object] = {"model": config.model, "prompt": prompt}
    if config.adapter == "lora":
        given["from-lora"] = folder
        if recipe.stream is not None:
            frames = STREAMED
        if recipe.condition in (FIRST_FRAME, LAST_FRAME):
            given["image"] = image or "first.png"
        if recipe.condition == CONTROL:
            given["video"] = next(iter(config.validation_controls), "control.mp4")
        if recipe.condition == LAST_FRAME:
            given["last-image"] = next(iter(config.validation_last_images), "last.png")
    else:
        given |= {"image-prompt": image or "image.png", "image-adapter": folder}
        frames = max(frames, recipe.trained_frames or 0)
    given |= {"frames": frames, "height": config.height, "width": config.width, "out": "video.mp4"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += ["--stream"] if recipe.stream is not None else []
    return shlex.join(["gen-accel", "generate", *words])


def _of_steps(folder: Path, name: str) -> dict[int, Path]:
    """Files or folders called `name` in the folders of steps, by the number of the step."""
    found = {path.parent.name[len("step-") :]: path for path in folder.glob(f"step-*/{name}")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdigit()))
