"""Four times the length that the demo model was trained at: as it is, and with its LoRA and
`fresh_noise`."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel import demo
from gen_accel.demo.detector import detect
from gen_accel.measure.video_io import side_by_side
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.recipe import read_recipe
from gen_accel.pipelines.sampling import Clip, Loading, filled, load, sample, steps_bar, ticker

FRAMES = 4 * (demo.TRAINED_FRAMES - 1) + 1
TECHNIQUE = "fresh_noise"
DTYPE = "bfloat16"  # of both


def lora_path(*, guided: bool = False) -> Path:
    """The demo model's LoRA that holds its guidance, made by configs/lora/demo_guided.yaml, or the
    one that is sampled with guidance, made by demo.yaml."""
    return Path(__file__).parent / ("long_lora_guided" if guided else "long_lora")


@dataclass(frozen=True)
class Longer:
    """The same prompt and seed, twice. Videos are (F, H, W, 3) uint8.

    Args:
        dense: of the model as it is; `trained` with the LoRA, through the attention of the LoRA,
            with noise that is drawn anew at each step.
        *_seconds: of the denoising.
        density: of the attention that the LoRA was trained with.
        guidance_scales: of both.
    """

    prompt: str
    dense: np.ndarray
    trained: np.ndarray
    dense_seconds: float
    trained_seconds: float
    density: float | None
    method: str
    guidance_scales: tuple[float, float]

    def side_by_side(self) -> np.ndarray:
        kind = self.method.split("(")[0].lower()
        labels = ["dense, no LoRA", f"{kind}, LoRA, {TECHNIQUE}"]
        return side_by_side([self.dense, self.trained], labels)

    def to_dict(self) -> dict[str, Any]:
        seen = {"dense": detect(self.dense), "trained": detect(self.trained)}
        return {
            "frames": len(self.dense),
            "trained_frames": demo.TRAINED_FRAMES,
            "method": self.method,
            "lora_density": self.density,
            "guidance_scales": dict(zip(("dense", "lora"), self.guidance_scales, strict=True)),
            "dense_seconds": self.dense_seconds,
            "lora_seconds": self.trained_seconds,
            "times_as_fast": self.dense_seconds / self.trained_seconds,
            "detector": {
                name: {"shows": found.caption, **asdict(found)} for name, found in seen.items()
            },
        }


def compare(prompt: str, clip: Clip, *, lora: Path | None = None) -> Longer:
    """Generate both.

    Args:
        clip: of the demo model's size; its frames are set here.
    """
    lora = lora if lora is not None else lora_path()
    pipe = load(demo.path(), Loading(DTYPE, "cpu"))
    clip = filled(pipe, replace(clip, frames=FRAMES))
    recipe = read_recipe(lora)
    clips = {"dense": clip, "trained": clip}
    if recipe.holds_guidance:
        clips["trained"] = replace(clip, guidance_scale=1.0)
    taken, density, run = {}, None, None
    with steps_bar() as bar:
        for name in ("dense", "trained"):
            if name == "trained":
                pipe.load_lora_weights(str(lora))
                pipe.fuse_lora()  # a LoRA beside the weights would cost a tenth of a step
                handle = attach(pipe, from_lora=lora)
                run = extend(pipe, TECHNIQUE, num_frames=FRAMES)
            sample(pipe, prompt, replace(clips[name], frames=5, steps=1))
            label = f"{FRAMES} frames, {'with' if name == 'trained' else 'without'} LoRA"
            start = time.perf_counter()
            made = sample(pipe, prompt, clips[name], tick=ticker(bar, label), run=run)
            taken[name] = made.video, time.perf_counter() - start - made.decode_seconds
        density = handle.summary().density  # pyright: ignore[reportPossiblyUnboundVariable]
    scales: Any = tuple(one.guidance_scale for one in clips.values())
    return Longer(
        prompt,
        taken["dense"][0],
        taken["trained"][0],
        taken["dense"][1],
        taken["trained"][1],
        density,
        repr(recipe.build_method()),
        scales,
    )


def notes(report: dict[str, Any]) -> list[str]:
    """What the page says about it."""
    seen, scales = report["detector"], report["guidance_scales"]
    guided = ""
    if scales["lora"] != scales["dense"]:
        guided = (
            " The LoRA holds the guidance that the model has to be given, so that a step calls "
            "the model once and not twice."
        )
    return [
        f"The model was trained on {report['trained_frames']} frames. At {report['frames']}, as "
        f"it is, it showed: {seen['dense']['shows']}. With its long-video LoRA, trained at that "
        f"length through sparse attention, and noise that is drawn anew at each step "
        f"({TECHNIQUE}), it showed: {seen['trained']['shows']}. Denoising took "
        f"{report['lora_seconds']:.1f} s with the LoRA and {report['dense_seconds']:.1f} s "
        f"without, {report['times_as_fast']:.2f} times as fast.{guided}"
    ]
