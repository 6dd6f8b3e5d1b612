"""Videos sampled while an adapter trains, each beside its version before the first step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.extras import needed_for
from gen_accel.files import replacing
from gen_accel.lora.artefact import held_guidance
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.experts import parts_of
from gen_accel.lora.visits import sampling_on
from gen_accel.measure.sheets import side_by_side
from gen_accel.measure.video_io import read_video, write_video
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.arguments import first_transformer, served_family
from gen_accel.pipelines.generation.given import Given
from gen_accel.pipelines.generation.inputs import fit
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.long_video import extend

with needed_for("training", extra="train"):
    from accelerate import Accelerator


FOLDER = "validation"
BESIDE, STRIP = ".beside_start.mp4", ".frames.jpg"  # ends of names after a prompt's number
COLUMNS, COLUMN = 6, 200  # frames of a strip, and the most pixels that one is wide
GAP = 4  # pixels between them


class Validation:
    """Sampler of the same prompts from the same seeds at every call.

    Writes `step-000200/00.mp4` and so on, `00.beside_start.mp4` with the video of step 0 on the
    left, and `00.frames.jpg` with some of the frames. All processes generate, as the model may be
    sharded over them; one writes.

    Args:
        adapter: the adapter, whose `sampling(i)` sets a video's inputs beside the prompt.
        trained_frames: pixel frames that the model was trained on.
        prompts: the prompts as the pipeline takes them encoded; None for the text.
        pictures: function from a prompt's number to the picture that its video begins with, of
            a clip; None where videos are sampled from text alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipe: Any,
        folder: Path,
        accelerator: Accelerator,
        adapter: Any,
        *,
        trained_frames: int | None,
        prompts: Sequence[Mapping[str, Tensor]] | None = None,
        pictures: Callable[[int], Any] | None = None,
    ) -> None:
        self.config, self.pipe, self.folder = config, pipe, folder
        self.prompts = prompts
        self.accelerator, self.adapter = accelerator, adapter
        family = served_family(pipe)
        own = family.fps(first_transformer(pipe)) if family.TAKES_FPS else 16.0
        self.fps = config.fps or float(own)
        clip = Clip(
            config.validation_frames or config.longest,
            config.height,
            config.width,
            config.validation_steps,
            guidance_of(config),
            fps=self.fps,
            max_tokens=config.max_tokens,
        )
        self.begins = [
            fit(pipe, clip, Given(image=self._picture(i, pictures)).opened())[1]
            for i in range(len(config.validation_prompts) if pictures is not None else 0)
        ]
        arguments = self.begins[0].arguments if self.begins else ()
        self.clip = filled(pipe, clip, arguments)
        assert clip.frames is not None
        is_longer = trained_frames is not None and clip.frames > trained_frames
        self.techniques = config.sample_with if is_longer else ()
        self.lengths = {"num_frames": clip.frames, "trained_frames": trained_frames}
        # Called with a prompt's number, the steps done and their total.
        self.tell: Callable[[int, int, int], None] = lambda prompt, step, steps: None

    @property
    def calls(self) -> int:
        """Number of forward passes of all prompts."""
        each = self.config.validation_steps * (2 if guidance_of(self.config) > 1 else 1)
        return each * len(self.config.validation_prompts)

    @torch.no_grad()
    def __call__(self, done: int) -> None:
        place = self.folder / f"step-{done:06d}"
        for i, prompt in enumerate(self.config.validation_prompts):
            clip = replace(self.clip, seed=i)
            self.tell(i, 0, self.config.validation_steps)
            with ExitStack() as stack:
                stack.enter_context(self.accelerator.autocast())
                stack.enter_context(self.adapter.sampling(i))
                longer = None
                if self.techniques:
                    longer = stack.enter_context(
                        extend(self.pipe, self.techniques, **self.lengths)
                    )
                inputs = self.begins[i] if self.begins else None
                run = stack.enter_context(
                    sampling_on(
                        self.accelerator.device,
                        self.pipe,
                        [getattr(self.pipe, part) for part in parts_of(self.config)],
                        prompt=self.prompts[i] if self.prompts else None,
                        run=longer,
                        is_given=inputs is not None,
                    )
                )
                about = {"run": run, "inputs": inputs, "tick": partial(self.tell, i)}
                video = sample(self.pipe, prompt, clip, **about).video
            if self.accelerator.is_main_process:
                self._write(place, i, video, done)
        self.accelerator.wait_for_everyone()

    def _picture(self, index: int, pictures: Callable[[int], Any] | None) -> Any:
        """Return the picture that a video begins with: a file, or else a clip's first frame."""
        assert pictures is not None
        files = self.config.validation_images
        return expanded(files[index]) if files else pictures(index)

    def _write(self, place: Path, i: int, video: np.ndarray, done: int) -> None:
        write_video(video, place / f"{i:02d}.mp4", fps=self.fps)
        write_strip(video, place / f"{i:02d}{STRIP}")
        start = self.folder / "step-000000" / f"{i:02d}.mp4"
        if done and start.exists():
            both = side_by_side([read_video(start), video], ["step 0", f"step {done}"])
            write_video(both, place / f"{i:02d}{BESIDE}", fps=self.fps)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                frames = torch.from_numpy(video).permute(0, 3, 1, 2)[None]
                _add_frames(tracker, f"validation/{i:02d}", frames, done)


def write_strip(video: np.ndarray, path: Path) -> None:
    """Write some frames of a video, (F, H, W, 3) uint8, side by side as a JPEG. Its comment holds
    their numbers."""
    numbers = np.linspace(0, len(video) - 1, min(COLUMNS, len(video))).round().astype(int)
    height, width = video.shape[1:3]
    shrink = min(1.0, COLUMN / width)
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    strip = Image.new("RGB", ((size[0] + GAP) * len(numbers) - GAP, size[1]), (44, 46, 52))
    for i, number in enumerate(numbers):
        strip.paste(Image.fromarray(video[number]).resize(size), (i * (size[0] + GAP), 0))
    with replacing(path) as partial:
        strip.save(partial, quality=85, comment=",".join(map(str, numbers)))


def read_numbers(path: Path) -> list[int]:
    """Read the numbers of the frames on a strip."""
    with Image.open(path) as strip:
        return [int(part) for part in strip.info["comment"].decode().split(",")]


def steps_above(pipe: Any, steps: int, boundary: float) -> int:
    """Count the denoising steps of a pipeline that belong to its expert for high noise.

    Args:
        boundary: noise level from which on it is used.
    """
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    least = boundary * scheduler.config.num_train_timesteps
    return int((scheduler.timesteps >= least).sum())


def guidance_of(config: TrainConfig) -> float:
    """Guidance scale of the validation videos."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    return 1.0 if held_guidance(config) > 1 else 5.0


def _add_frames(tracker: Any, name: str, frames: torch.Tensor, step: int) -> None:
    """Log five of the frames as pictures: TensorBoard's own videos need moviepy."""
    shown = frames[0, torch.linspace(0, frames.shape[1] - 1, 5).long()]
    tracker.writer.add_images(name, shown, step)
