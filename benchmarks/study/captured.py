"""q, k and v of the demo model while it generates densely, to take errors of attention on."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor

from gen_accel import Radial, VideoShape, attach, demo, extend
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.demo import world
from gen_accel.demo.detector import detect
from gen_accel.demo.job import lora_path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from demo_model.scoring import score

SIZE, STEPS, GUIDANCE, TEXT = 96, 20, 3.0, 16
FRAMES = 129
# The first scenes of the list that the demo model is scored by, fixed before any was generated.
SCENES = world.scored_scenes(24)
PROMPTS = tuple(scene.caption for scene in SCENES)


class Captured(NamedTuple):
    """One attention call of one layer, all of (1, H, N, D).

    Args:
        prompt: its number in `PROMPTS`, which is also the seed.
        step: of the denoising, counted from 0.
    """

    prompt: int
    step: int
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor


def pipeline() -> Any:
    """The demo model in fp32, without progress bars."""
    pipe = WanPipeline.from_pretrained(demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def of_lora(frames: int) -> Iterator[Any]:
    """The demo model with its LoRA for longer videos, which holds the guidance, at the positions
    that this was trained at."""
    pipe = pipeline()
    pipe.load_lora_weights(lora_path())
    pipe.fuse_lora()
    with extend(pipe, [read_recipe(lora_path()).rope], num_frames=frames):
        yield pipe


def sizes(frames: int) -> dict[str, Any]:
    """Arguments of the pipeline for any prompt, without the number of steps."""
    return {
        "height": SIZE,
        "width": SIZE,
        "num_frames": frames,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": TEXT,
    }


def arguments(prompt: int, frames: int, steps: int = STEPS) -> dict[str, Any]:
    """Arguments of the pipeline for one of `PROMPTS`."""
    noise = torch.Generator().manual_seed(prompt)
    run = {"num_inference_steps": steps, "generator": noise}
    return {"prompt": PROMPTS[prompt], **run, **sizes(frames)}


def shown(video: np.ndarray, prompt: int) -> dict[str, Any]:
    """Say what a clip (F, H, W, 3) of one of `PROMPTS` shows, and whether that is what was asked
    for, at its pace."""
    found = detect(video)
    return {"shows": found.caption, "right": score(found, SCENES[prompt]).right}


def grid(frames: int) -> VideoShape:
    """Tokens of a clip of so many frames."""
    return VideoShape(frames // 4 + 1, SIZE // 8, SIZE // 8)


def capture(
    pipe: Any,
    prompts: Sequence[int],
    steps: Sequence[int],
    frames: int = FRAMES,
    guidance: float = GUIDANCE,
) -> list[Captured]:
    """The prompted call of each layer, not the unguided one, at the given steps."""
    found: list[Captured] = []
    calls: set[tuple[int, int, int]] = set()
    with attach(pipe, Radial()) as handle:
        for prompt in prompts:

            def observe(seen: Any, of: int = prompt) -> None:
                call = of, handle.clock.step, seen.layer.number
                if call[1] in steps and call not in calls:
                    calls.add(call)
                    tensors = seen.q, seen.k, seen.v, seen.dense
                    found.append(Captured(*call, *(x.clone() for x in tensors)))

            handle.observe = observe
            try:
                run = arguments(prompt, frames) | {"guidance_scale": guidance}
                pipe(**run, output_type="latent")
            finally:
                handle.observe = None
    return found
