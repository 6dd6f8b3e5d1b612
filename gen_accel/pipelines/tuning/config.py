"""The config of a tuning: what a preset is tuned for and within, as flags, YAML and Python."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from gen_accel import registry
from gen_accel.config import Config, Words, option
from gen_accel.hub import check_pipeline
from gen_accel.paths import check_files, check_output, model_files
from gen_accel.pipelines.generation.config import (
    KERNELS,
    Clip,
    Weights,
    check_preset,
    with_profile,
)
from gen_accel.registry import AXES, Axis, Cost, Scale

if TYPE_CHECKING:
    import numpy as np

    from gen_accel.pipelines.tuning.preset import ScoreBound

    # "psnr", "latent_error", or a function of the dense and the sparse video, (F, H, W, 3) uint8,
    # to a score that is better if larger.
    Objective = str | Callable[[np.ndarray, np.ndarray], float]
else:
    Objective = Annotated[object, Words(Literal["psnr", "latent_error"])]

QUALITY, MOST_STEPS = 28.0, 1000  # dB, denoising steps
UNFINISHED = ("tuning", "tuning-masses")  # ends of the files that a tuning goes on from


class TuneOptions(Config):
    """Bound on quality, and options of the measurements."""

    cost: Cost = option(
        "seconds", "Quality", "Cost to make small: seconds of attention, or density."
    )
    scale: Scale = option(
        "mean",
        "Quality",
        "Sum of errors over the prompts: their mean; even, by which no prompt decides alone; or "
        "the worst, which bounds each prompt.",
    )
    by: tuple[Axis, ...] = option(
        AXES, "Quality", "Axes along which settings may differ.", choices=AXES, commas=True
    )
    quality: float | None = option(
        None,
        "Quality",
        "Least mean PSNR to the dense videos, in dB; of latent_error, the largest mean error. "
        f"Default: {QUALITY:g} dB.",
    )
    worst: float | None = option(
        None, "Quality", "Least PSNR of each prompt, in dB; of latent_error, the largest error."
    )
    objective: Objective = option(
        "psnr", "Quality", "Measure of quality: psnr of the videos, or latent_error."
    )
    rows: int = option(
        64,
        "Measuring",
        "Number of queries of a head that candidates are compared at, in calls of more than 160 "
        "times as many tokens.",
        ge=1,
    )
    weighed_steps: int = option(6, "Measuring", "Number of steps whose weight is measured.", ge=1)
    minutes: float | None = option(
        None, "Measuring", "Number of minutes after which no further choices are measured.", gt=0
    )
    kernel: str = option(
        "auto",
        "Measuring",
        "Kernel of the sparse attention; a named one never falls back to another.",
        metavar="NAME",
        choices=KERNELS,
    )

    @property
    def bound(self) -> "ScoreBound":
        """Bound on the scores of the tuning prompts, as a preset holds it.

        Raises ValueError for an objective without a default that has no `quality`.
        """
        name = self.objective
        name = name if isinstance(name, str) else getattr(name, "__name__", "function")
        if self.quality is None and name != "psnr":
            raise ValueError(f"--objective {name} needs --quality, the largest, such as 0.05")
        sign = -1 if name == "latent_error" else 1  # whose scores are the negative errors
        mean = QUALITY if self.quality is None else self.quality
        bound: ScoreBound = {"mean": sign * mean, "objective": name}
        return bound if self.worst is None else {**bound, "worst": sign * self.worst}


class TuneConfig(Weights, TuneOptions, Clip):
    """All that `gen-accel tune` takes."""

    VERB = "tune"

    model: str | None = option(
        None,
        "Model",
        "Folder of a diffusers pipeline, a hub repository, or demo, which is embedded.",
        metavar="DIR_OR_REPO",
        reads=model_files,
    )
    prompts: Path | None = option(
        None,
        "Model",
        "Text file with one prompt on each line, of what the model is used for.",
        metavar="FILE",
    )
    held_out: Path | None = option(
        None,
        "Model",
        "Text file of prompts that the choice is only measured on. Default: the second half.",
        metavar="FILE",
    )
    from_lora: Path | None = option(
        None,
        "Model",
        "LoRA of `gen-accel train` to tune with, its positions and guidance.",
        metavar="DIR",
        form="LoRA to tune with, its positions and guidance.",
    )
    preset: Path | None = option(
        None,
        "Model",
        "Preset in place of a model, from whose profile another choice is made.",
        metavar="FILE",
        reads=with_profile,
    )
    steps: int | None = option(
        None,
        "Clip",
        "Number of denoising steps, as many as will be used. Default: the model's own.",
        ge=1,
        le=MOST_STEPS,
    )
    out: Path = option(
        ...,
        "Output",
        "File of the preset to write, .json; its profile lies beside it.",
        metavar="FILE",
        writes=True,
    )

    def outputs(self) -> dict[str, list[Path]]:
        cut_off = [self.out.with_name(f"{self.out.stem}.{end}.safetensors") for end in UNFINISHED]
        return {"out": [*with_profile(self.out), *cut_off]}

    def new_outputs(self) -> dict[str, list[Path]]:
        return {"out": with_profile(self.out)}

    def check(self) -> None:
        """Refuse what does not go together, and files that are missing or cannot be written."""
        check_output(self.out, ".json")
        check_output(self.out.with_suffix(".safetensors"))
        check_output(self.out.with_name(f"{self.out.stem}.{UNFINISHED[0]}.safetensors"))
        if self.preset is not None:
            check_preset(self.preset)
            if str(self.preset) in registry.PRESETS and not self.preset.is_file():
                raise FileNotFoundError(
                    f"no preset at {self.preset}: only a file can be solved again"
                )
            self.check_only("preset", "quality", "steps", "out")
            if self.quality is None and self.steps is None:
                raise ValueError("--preset is solved for --quality, --steps or both: give one")
            return
        if self.model is None or self.prompts is None:
            raise ValueError("give --model and --prompts, or --preset to solve one again")
        check_pipeline(self.model)
        check_files("file of prompts", self.prompts, self.held_out)
        check_files("LoRA", self.from_lora)
        self.check_loras()
        registry.check_kernel(self.kernel)
        if self.sampler in registry.DRAWING:
            raise ValueError(
                f"tuning compares runs of the same noise, and sampler {self.sampler} draws more: "
                "take euler"
            )
        _ = self.bound  # refuses an objective without its quality
