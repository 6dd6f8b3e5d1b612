"""Clips of four times the demo model's trained length, without and with its LoRAs."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gen_accel import demo
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.demo.detector import detect
from gen_accel.measure.sheets import side_by_side
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.progress import steps_bar, ticker
from gen_accel.pipelines.generation.sampling import Clip, filled, sample
from gen_accel.pipelines.long_video import extend

FRAMES = 4 * (demo.TRAINED_FRAMES - 1) + 1
DTYPE = "bfloat16"  # of all


def lora_path(*, guided: bool = False) -> Path:
    """Path of the demo model's LoRA that guidance is distilled into
    (configs/lora/demo_guided.yaml). With `guided`, of the LoRA that is sampled with guidance
    (configs/lora/demo.yaml)."""
    return Path(__file__).parent / ("long_lora_guided" if guided else "long_lora")


@dataclass(frozen=True)
class Sampled:
    """One clip, and how it was made.

    Args:
        video: (F, H, W, 3) uint8.
        seconds: of the denoising.
        method: the attention that the LoRA was trained with; None: dense, without a LoRA.
        techniques: of `extend`, beside the rule of the LoRA's rotary positions.
    """

    video: np.ndarray
    seconds: float
    guidance_scale: float
    method: str | None = None
    density: float | None = None
    techniques: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        if self.method is None:
            return "dense, no LoRA"
        kind = f"{self.method.split('(')[0].lower()}, LoRA"
        guided = "with guidance" if self.guidance_scale > 1 else "that holds guidance"
        return ", ".join((f"{kind} {guided}", *self.techniques))

    def to_dict(self) -> dict[str, Any]:
        found = detect(self.video)
        given = {key: value for key, value in vars(self).items() if key != "video"}
        return given | {"label": self.label, "shows": found.caption, "detector": asdict(found)}


@dataclass(frozen=True)
class Longer:
    """Clips of one prompt and seed: without LoRA, and with each LoRA by the name of its folder."""

    prompt: str
    dense: Sampled
    trained: dict[str, Sampled]

    def side_by_side(self) -> np.ndarray:
        clips = [self.dense, *self.trained.values()]
        labels = [clip.label for clip in clips]
        return side_by_side([clip.video for clip in clips], labels, scale=2)

    def to_dict(self) -> dict[str, Any]:
        return {
            "frames": len(self.dense.video),
            "trained_frames": demo.TRAINED_FRAMES,
            "dense": self.dense.to_dict(),
            "trained": {
                name: clip.to_dict() | {"times_as_fast": self.dense.seconds / clip.seconds}
                for name, clip in self.trained.items()
            },
        }


def compare(prompt: str, clip: Clip) -> Longer:
    """Generate the clips.

    Args:
        clip: of the demo model's size; its frames are set here.
    """
    loras = [lora_path(guided=True), lora_path()]
    with steps_bar() as bar:
        dense = _sampled(prompt, clip, None, bar)
        return Longer(
            prompt, dense, {lora.name: _sampled(prompt, clip, lora, bar) for lora in loras}
        )


def _sampled(prompt: str, clip: Clip, lora: Path | None, bar: Any) -> Sampled:
    pipe = load(demo.path(), Loading(DTYPE, "cpu"))
    clip = filled(pipe, replace(clip, frames=FRAMES))
    recipe, handle, run = None, None, None
    if lora is not None:
        recipe = read_recipe(lora)
        pipe.load_lora_weights(str(lora))
        pipe.fuse_lora()  # a LoRA beside the weights would cost a tenth of a step
        handle = attach(pipe, from_lora=lora)
        if recipe.techniques:
            run = extend(pipe, recipe.techniques, num_frames=FRAMES)
        if recipe.holds_guidance:
            clip = replace(clip, guidance_scale=1.0)
    sample(pipe, prompt, replace(clip, frames=5, steps=1))
    label = f"{FRAMES} frames, " + (f"LoRA {lora.name}" if lora else "no LoRA")
    start = time.perf_counter()
    made = sample(pipe, prompt, clip, tick=ticker(bar, label), run=run)
    seconds = time.perf_counter() - start - made.decode_seconds
    scale: Any = clip.guidance_scale
    if recipe is None or handle is None:
        return Sampled(made.video, seconds, scale)
    density = handle.summary().density
    method = repr(recipe.build_method())
    return Sampled(made.video, seconds, scale, method, density, recipe.techniques)


def notes(report: dict[str, Any]) -> list[str]:
    """Notes for the report's page."""
    dense = report["dense"]
    found = [
        f"The model was trained on {report['trained_frames']} frames. At {report['frames']}, as "
        f"it is, it showed: {dense['shows']}. Denoising took {dense['seconds']:.1f} s. It has two "
        "LoRAs, trained at that length through sparse attention."
    ]
    for name, clip in report["trained"].items():
        how = "is sampled as the model is, with guidance"
        if clip["guidance_scale"] != dense["guidance_scale"]:
            how = (
                "holds the guidance that the model has to be given, so that a step calls the "
                "model once and not twice"
            )
        if "fresh_noise" in clip["techniques"]:
            how += ", and gets noise that is drawn anew at each step (fresh_noise)"
        found.append(
            f"{name} (density {clip['density']:.2f}) {how}. It showed: {clip['shows']}. That took "
            f"{clip['seconds']:.1f} s, {clip['times_as_fast']:.2f} times as fast."
        )
    found.append(
        "One clip says little about either: how many of 48 each gets right is in "
        "docs/longer_videos.md."
    )
    return found
