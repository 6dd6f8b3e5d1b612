"""`gen-accel estimate`."""

from typing import Literal

from gen_accel.cli.app import app
from gen_accel.cli.loading import loading, unneeded, without
from gen_accel.cli.printing import FiguresConfig, terminal_width
from gen_accel.cli.verb import verb
from gen_accel.config import Config, option
from gen_accel.hub import check_subject
from gen_accel.paths import model_files, model_named
from gen_accel.pipelines.generation.config import (
    LONGEST,
    SCHEDULE,
    MethodConfig,
    ZonesConfig,
    check_length,
)
from gen_accel.registry import Quantised, check_loading
from gen_accel.video import VideoShape

# Fields of each point of --curve.
CURVE = ("num_frames", "tokens", "density", "attention_share", "speedup")


class RunConfig(Config):
    """The model and the video that a cost is asked of."""

    model: str = option(
        ...,
        "Run",
        "Folder or hub repository of a pipeline, name of a published model such as "
        "Wan2.1-T2V-14B, family or class of `gen-accel models`, or demo, which is embedded.",
        metavar="MODEL",
        reads=model_files,
        form="Folder or hub repository of a pipeline, a published model, or demo.",
    )
    frames: int | None = option(
        None,
        "Run",
        "Number of frames of the video, not latents. Default: the model's own.",
        ge=1,
    )
    seconds: float | None = option(
        None,
        "Run",
        "Length in seconds, in place of a number of frames: the nearest number that the model "
        "makes, at its own frame rate.",
        gt=0,
        le=LONGEST,
    )
    height: int | None = option(None, "Run", "Height in pixels. Default: the model's own.", ge=1)
    width: int | None = option(None, "Run", "Width in pixels. Default: the model's own.", ge=1)
    steps: int | None = option(
        None, "Run", "Number of denoising steps. Default: the preset's own, or the model's.", ge=1
    )
    guidance_scale: float | None = option(
        None,
        "Run",
        "Scale of classifier-free guidance, which runs the model twice a step; 1 turns it off. "
        "Default: as the model's pipeline.",
    )
    text: int | None = option(
        None,
        "Run",
        "Length of the prompt in tokens. Default: as the pipelines pad every prompt.",
        ge=0,
        le=1_000_000,
    )


class EstimateConfig(FiguresConfig, ZonesConfig, MethodConfig, RunConfig):
    """A run whose cost is estimated."""

    VERB = "estimate"
    RIVALS = (
        (("method", "set"), ("preset",)),
        (("preset",), ("method", "set")),
        (("frames",), ("seconds",)),
        (("seconds",), ("frames",)),
    )

    gpu: str | None = option(
        None,
        "Device",
        "Card to estimate for: h100, h200, a100, 4090, 5090 and others. Default: this machine.",
        metavar="CARD",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Device", "Type of the weights; auto: float32 on a CPU, bfloat16 elsewhere."
    )
    offload: Literal["none", "model", "group", "sequential"] = option(
        "none", "Device", "Parts that wait in CPU memory: models, groups of layers, or layers."
    )
    quantize: Quantised | None = option(
        None,
        "Device",
        "Weights of the transformer's blocks in 8 bits, fp8 or int8, or in 4, nf4. Default: as "
        "--dtype has them.",
        form="Weights of the transformer's blocks in 8 bits, fp8 or int8, or in 4, nf4. Default: "
        "as the files have them.",
    )
    efficiency: float | None = option(
        None,
        "Device",
        "Share of the ideal speed-up that the kernel reaches. Default: a card's published range, "
        "or measured here.",
        gt=0,
    )
    remeasure: bool = option(
        False, "Device", "Rates and efficiency of this machine are measured again."
    )
    stream: bool = option(
        False,
        "Run",
        "A stream, which `gen-accel generate --stream` makes chunk by chunk: what a frame costs.",
        form="A stream, made chunk by chunk: what a frame costs.",
    )
    curve: bool = option(
        False, "Output", "Also density and speed-up by FLOPs at other numbers of frames."
    )
    bound: bool = option(
        False, "Output", "Also the best strides and tiles for the window of neighborhood."
    )

    def check(self) -> None:
        """Refuse unknown names, and options that do not go together."""
        check_subject(self.model)
        check_length(self.frames, self.seconds)
        check_loading(self.dtype, self.offload, self.quantize)
        self.check_method(self.steps)
        whole = {"method", "set", "preset", *SCHEDULE, "curve", "bound", "efficiency"}
        given = [name for name in self.options() if name in whole and self.is_given(name)]
        for name in given if self.stream else ():
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is of a whole clip, got --stream too: leave one out")
        self.check_zones(stream=self.stream)
        if self.gpu is not None:
            from gen_accel.measure.cost.figures import card_named

            card_named(self.gpu)
        if self.bound and self.method != "neighborhood":
            told = self.method or self.chosen_preset
            raise ValueError(f"--bound is for the method neighborhood, got {told}")


@verb(app, EstimateConfig, short_help="Seconds, GB and the speed-up to expect, without running.")
def estimate(config: EstimateConfig) -> None:
    """Seconds, memory and speed-up to expect, without running or loading the model.

    \b
    gen-accel estimate --model Wan2.1-T2V-14B --gpu 4090
        the clip and the steps that the model is run with where nothing is said
    gen-accel estimate --model Wan2.1-T2V-14B --height 720 --width 1280 --frames 161 \\
        --gpu h100
    gen-accel estimate --model hunyuan_video --height 720 --width 1280 --frames 129 \\
        --gpu 4090 --offload model
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --method radial --set decay_factor=0.2 --dense-start 0.25 --dense-layers 1
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 81 \\
        --efficiency 0.7 --json cost.json
    gen-accel estimate --model models/wan --height 480 --width 832 --frames 81 \\
        --preset preset.json
    gen-accel estimate --model wan --height 480 --width 832 --frames 81 --gpu 4090 --curve
        also how it changes with the number of frames
    gen-accel estimate --model HunyuanVideo --height 768 --width 1280 --frames 117 --gpu h100 \\
        --method neighborhood --set window=18,24,24 --bound
        also the speed-up that whole tiles of a kernel allow, by stride
    gen-accel estimate --model Wan2.1-T2V-1.3B --stream --gpu h100 --guidance-scale 1
        a frame of a video without end, and whether it is made as fast as it plays
    gen-accel generate --model models/wan --prompt "a cat surfs" --plan --gpu h100
        the same figures, for exactly the run that the other options describe

    With --gpu, seconds are ranges from the card's data sheet. Without, they are of this machine,
    whose rates and kernel efficiency are measured the first time, which takes seconds.
    """
    config.check()
    with without(*unneeded(config.model)):
        config.show(*_estimated(config))


def _estimated(config: EstimateConfig) -> tuple[list[str], dict[str, object]]:
    """Estimate in lines and as data."""
    with loading():
        from gen_accel.attention_processors.methods.neighborhood import Neighborhood
        from gen_accel.measure.cost.bounds import best_tiles, bound_lines
        from gen_accel.measure.cost.estimate import over_lengths
        from gen_accel.measure.cost.forecast import curve_lines, forecast
        from gen_accel.measure.cost.model import subject_of
        from gen_accel.pipelines.generation.model_index import frame_rate_of, whole_run

    source = model_named(config.model)
    frames, height, width, steps = whole_run(config.model, config)
    if config.stream:
        from gen_accel.pipelines.generation.stream import StreamSettings
        from gen_accel.pipelines.generation.stream_cost import forecast_stream

        stream = forecast_stream(
            source,
            zones=StreamSettings().changed(config.zones).zones,
            height=height,
            width=width,
            fps=frame_rate_of(config.model),
            frames=config.frames,
            steps=config.steps,
            gpu=config.gpu,
            dtype=config.dtype,
            offload=config.offload,
            quantize=config.quantize,
            guidance_scale=config.guidance_scale,
            text=config.text,
            remeasure=config.remeasure,
        )
        return stream.lines(terminal_width()), stream.to_dict()
    schedule = config.built_schedule()
    if config.chosen_preset is None:
        method = config.built_method()
    else:
        from gen_accel.pipelines.tuning.preset import choose_preset

        call = {
            "num_frames": frames,
            "height": height,
            "width": width,
            "num_inference_steps": config.steps,
        }
        model = subject_of(source, config.text).model
        method, schedule, tuned = choose_preset(
            config.chosen_preset, model, schedule, call, quiet=config.preset is None
        )
        steps = steps if tuned is None else tuned.method.steps
    found = forecast(
        source,
        method,
        gpu=config.gpu,
        dtype=config.dtype,
        offload=config.offload,
        quantize=config.quantize,
        guidance_scale=config.guidance_scale,
        text=config.text,
        efficiency=config.efficiency,
        remeasure=config.remeasure,
        height=height,
        width=width,
        num_frames=frames,
        schedule=schedule,
        steps=steps,
    )
    lines, data = found.lines(terminal_width()), found.to_dict()
    if config.curve:
        points = over_lengths(source, found.estimate)
        lines += ["", *curve_lines(points)]
        data["curve"] = [{name: getattr(one, name) for name in CURVE} for one in points]
    if config.bound and isinstance(method, Neighborhood):
        bounds = best_tiles(VideoShape(*found.estimate.video.grid), method)
        lines += ["", *bound_lines(bounds, terminal_width())]
        data["bounds"] = [one.to_dict() for one in bounds]
    return lines, data
