"""The config of a generation: all that `generate` takes, as flags, YAML, a form and settings."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import field_validator, model_validator

from gen_accel import published, registry
from gen_accel.cluster import cluster_of
from gen_accel.config import Config, Outputs, Words, check_text, option
from gen_accel.hub import check_pipeline, check_sources, check_there, file_in, parted
from gen_accel.io import plain, read_fields, read_text
from gen_accel.memory import check_room
from gen_accel.parsing import shown
from gen_accel.paths import (
    BUNDLED_PRESETS,
    CHUNKS,
    adapter_named,
    check_files,
    check_input,
    check_no_pickle,
    check_output,
    check_picture,
    check_video_path,
    comparison_files,
    expanded,
    free_name,
    model_files,
    numbered,
    preview_of,
    record_of,
)
from gen_accel.pipelines.sampler import Sampler, check_levels
from gen_accel.pipelines.zones import read_zones
from gen_accel.registry import FIRST, LAST, VIDEO, LinearKernel, Quantised

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from typing_extensions import Self

    from gen_accel.attention_processors.attached.schedule import Schedule
    from gen_accel.method import Method
    from gen_accel.pipelines.tuning.preset import Preset

    MethodWords = str | Method | None
    PresetWords = str | Path | Preset | None
    PictureFile = str | Path | Image.Image | np.ndarray | None
    PictureFiles = Sequence[str | Path | Image.Image]
    VideoFile = str | Path | np.ndarray | Sequence[Image.Image] | None
else:
    MethodWords = PresetWords = Annotated[object, Words(str | None)]
    PictureFile = VideoFile = Annotated[object, Words(Path | None)]
    PictureFiles = Annotated[object, Words(tuple[Path, ...])]

LONGEST = 3600.0  # seconds of a clip
TIMED = re.compile(r"\s*(\d+)\s*:\s*(.+)", re.DOTALL)  # a prompt of a stream, from a frame on
KERNELS = ("auto", *registry.KERNELS)
SCHEDULE = {  # fields, and what `Schedule` calls them
    **{name: name for name in ("dense_start", "dense_end", "dense_steps", "dense_layers")},
    **{"dense_at": "dense", "dense_noise": "dense_noise"},
}
FRESH = "fresh_noise"  # a technique that samples
OWN = "own"  # the model's own attention, among the kernels
# Fields that a dense video does without.
ATTENTION = ("method", "set", "preset", "kernel", "dense_kernel", "cache", *SCHEDULE)


def with_profile(preset: str | Path) -> list[Path]:
    """Return the file of a preset, and the profile beside it."""
    return [Path(preset), Path(preset).with_suffix(".safetensors")]


def preset_files(name: str) -> list[Path]:
    """Return the file of a preset, or all that a name stands for, of one model each."""
    own = BUNDLED_PRESETS.glob(f"*-{name}.json")
    return sorted(own) if name in registry.PRESETS else [Path(name)]


class Videos(Config):
    """Prompts, model and outputs of a generation."""

    model: str = option(
        ...,
        "Videos",
        "Folder of a diffusers pipeline, a hub repository, or demo, which is embedded.",
        metavar="DIR_OR_REPO",
        reads=model_files,
    )
    prompt: tuple[str, ...] = option(
        (), "Videos", "Text of what to show; may be repeated.", longest=registry.MOST_PROMPT
    )
    prompts: Path | None = option(
        None,
        "Videos",
        "Text file with one prompt on each line; outputs are numbered.",
        metavar="FILE",
        kept=False,
    )
    out: Path = option(
        Path("outputs/video.mp4"),
        "Videos",
        "Output: .mp4, .gif, .png, or no suffix for a folder of PNG frames; if the default is "
        "there already, the next free number, video-2.mp4.",
        kept=False,
        writes=True,
    )


class Clip(Config):
    """A clip to generate."""

    frames: int | None = option(
        None,
        "Clip",
        "Number of frames. Default: the model's own, or as --from-lora was trained.",
        ge=1,
        le=1_000_000,
        form="Number of frames. Default: the model's own.",
    )
    height: int | None = option(None, "Clip", "Height in pixels. Default: the model's own.", ge=1)
    width: int | None = option(None, "Clip", "Width in pixels. Default: the model's own.", ge=1)
    steps: int | None = option(
        None, "Clip", "Number of denoising steps. Default: the model's own.", ge=1, le=10_000
    )
    guidance_scale: float | None = option(
        None,
        "Clip",
        "Scale of classifier-free guidance; 1 turns it off. Default: the model's own, or 1 with a "
        "LoRA that holds its guidance.",
        form="Scale of classifier-free guidance; 1 turns it off. Default: the model's own.",
    )
    negative_prompt: str | None = option(
        None, "Clip", "Text of what the video must not show.", longest=registry.MOST_PROMPT
    )
    sampler: Literal["euler", "unipc", "lcm", "dpmpp_2m_sde"] | None = option(
        None,
        "Clip",
        "Sampler of a flow-matching model, on exact noise levels; lcm and dpmpp_2m_sde draw noise "
        "at each step. Default: the model's own.",
    )
    levels: tuple[float, ...] = option(
        (),
        "Clip",
        "Noise at which each step begins, falling, above 0 and at most 1: 1,0.9375,0.8333,0.625. "
        "Default: equal steps, shifted.",
    )
    shift: float | None = option(
        None,
        "Clip",
        "Shift of the noise levels of equal steps; 1: none. Default: the model's own.",
        gt=0,
    )
    seed: int = option(
        0, "Clip", "Seed of the first prompt; prompt i has seed + i.", ge=0, le=2**63 - 1
    )
    fps: float | None = option(
        None,
        "Clip",
        "Frames per second of the file, which some models are told too. Default: the model's own.",
        ge=0.01,
        le=1000.0,
    )
    max_tokens: int | None = option(
        None, "Clip", "Length of a prompt in tokens. Default: the model's own.", ge=1
    )

    @model_validator(mode="after")
    def _fits_memory(self) -> "Self":
        if self.max_tokens is not None:  # text encoders mask each pair of tokens
            check_room(f"max_tokens {self.max_tokens}", self.max_tokens**2, "ask for fewer")
        return self

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "Self":
        _ = self.sampling  # refuses what does not go together
        if self.levels:
            check_levels(self.levels, self.steps)
            object.__setattr__(self, "steps", len(self.levels))
        return self

    @property
    def sampling(self) -> Sampler | None:
        """The sampler; None for the pipeline's own."""
        if self.sampler is None and self.shift is None and not self.levels:
            return None
        return Sampler(self.sampler, self.levels, self.shift)


class Device(Config):
    """The device to run on."""

    device: str = option(
        "auto",
        "Loading",
        "Device to run on: auto, cpu, cuda, cuda:1, mps and others.",
        metavar="NAME",
        choices=("auto", *registry.DEVICES[:3]),
    )

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str) -> str:
        registry.check_device(device)
        return device


class Weights(Device):
    """The weights to load."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Loading", "Type of the weights; auto: float32 on a CPU, bfloat16 elsewhere."
    )
    loras: tuple[str, ...] = option(
        (),
        "Loading",
        "LoRA to load, with a weight if it is not 1, as REPO:FILE of a repository of several; may "
        "be repeated.",
        name="lora",
        metavar="DIR_OR_REPO[:WEIGHT]",
        reads=lambda text: parted(text)[0],
        form="LoRA to load, with a weight if it is not 1: folder:0.8.",
    )

    def check_loras(self) -> None:
        """Refuse a LoRA that is neither here nor on the hub."""
        for lora in self.loras:
            check_no_pickle(expanded(parted(lora)[0]))
            check_there(file_in(parted(lora)[0])[0], "LoRA")


class Loading(Weights):
    """Options for loading a pipeline."""

    offload: Literal["none", "model", "group", "sequential"] = option(
        "none",
        "Loading",
        "Parts that wait in CPU memory: models, groups of layers, or layers.",
        kept=False,
    )
    quantize: Quantised | None = option(
        None,
        "Loading",
        "Weights of the transformer's blocks in 8 bits, fp8 or int8, or in 4, nf4; they compute "
        "in --dtype. Default: as the files have them.",
        form="Weights of the transformer's blocks in 8 bits, fp8 or int8, or in 4, nf4. Default: "
        "as the files have them.",
    )

    def check_quantised(self) -> None:
        """Refuse a package that is not there, and offloading that takes weights apart which one
        holds together."""
        package = registry.QUANTISERS.get(self.quantize or "")
        if package is not None:
            registry.check_package(f"quantize {self.quantize}", package, extra="quantized")
        registry.check_loading(self.dtype, self.offload, self.quantize)


class ConditioningFiles(Config):
    """Pictures and video that a video is made from. In Python also PIL images and (H, W, 3) or
    (F, H, W, 3) uint8."""

    image: PictureFile = option(
        None,
        "Inputs",
        "Picture of the first frame; see `gen-accel models`.",
        metavar="FILE",
        accept="image",
        form="Picture of the first frame.",
    )
    last_image: PictureFile = option(
        None, "Inputs", "Picture of the last frame.", metavar="FILE", accept="image"
    )
    video: VideoFile = option(
        None,
        "Inputs",
        "Input video: to restyle, to continue, as control or reference, by pipeline.",
        metavar="FILE",
        accept="video",
    )
    strength: float | None = option(
        None,
        "Inputs",
        "Share of the input video to remake, up to 1. Default: the model's own.",
        gt=0,
        le=1,
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of files that are given, of `registry.KINDS`."""
        return tuple(kind for kind, file in self._by_kind().items() if file is not None)

    def _by_kind(self) -> dict[str, object]:
        return {FIRST: self.image, LAST: self.last_image, VIDEO: self.video}

    def check_inputs(self, techniques: Sequence[str] = ()) -> None:
        """Refuse missing files, files that are no pictures, and techniques beside them."""
        for kind, file in self._by_kind().items():
            if isinstance(file, str | Path):
                check_files(kind, file)
                if kind != VIDEO:
                    check_picture(file)
        if self.strength is not None and self.video is None:
            raise ValueError(
                f"strength {self.strength:g} is the share of a video to remake: give a video too"
            )
        for name in techniques if self.kinds else ():
            word = registry.split_technique(name)[0]
            own_noise = self.video is not None and word in registry.OWN_NOISE
            if word == "continuation" or own_noise:
                raise ValueError(
                    f"{name} does not go with a {' and a '.join(self.kinds)}, as it begins from "
                    "latents of its own: choose another technique, or none"
                )


class ImagePromptConfig(Config):
    """Image prompts of all videos, beside their texts."""

    image_prompt: PictureFiles = option(
        (),
        "Image prompt",
        "Picture that the video follows beside the text; several act together.",
        metavar="IMAGE",
        accept="image",
    )
    image_adapter: str | None = option(
        None,
        "Image prompt",
        "Adapter that reads the pictures: a file, folder, hub repository, or demo.",
        metavar="SOURCE",
        reads=adapter_named,
    )
    image_scale: float = option(
        1.0, "Image prompt", "Strength of the pictures; 1: as in training, 0: none."
    )
    image_negative: PictureFile = option(
        None,
        "Image prompt",
        "Picture of the negative prompt. Default: no picture.",
        metavar="IMAGE",
        accept="image",
    )
    image_mask: PictureFiles = option(
        (),
        "Image prompt",
        "Mask of the area of a picture, white inside: one for all pictures, or one for each.",
        metavar="FILE",
        accept="image",
    )
    image_encoder: str | None = option(
        None,
        "Image prompt",
        "CLIP vision model, for an adapter that does not name its own.",
        metavar="DIR_OR_REPO",
        reads=Path,
    )

    def check_image_prompt(self) -> None:
        """Refuse options that need each other, and files that are not there."""
        check_sources("adapter", self.image_adapter)
        check_sources("image encoder", self.image_encoder)
        for file in (*self.image_prompt, *self.image_mask, self.image_negative):
            if isinstance(file, str | Path):
                check_files("image", file)
        given = [name for name in ImagePromptConfig.options() if self.is_given(name)]
        if given and not (self.image_prompt and self.image_adapter):
            wrong = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"an image prompt is --image-prompt and --image-adapter, got {wrong} alone"
            )
        if len(self.image_mask) not in (0, 1, len(self.image_prompt)):
            raise ValueError(
                f"masks must be one, or one for each of {len(self.image_prompt)} images, got "
                f"{len(self.image_mask)}"
            )


class ZonesConfig(Config):
    """Zones of earlier chunks that a chunk of a stream sees."""

    zones: tuple[str, ...] = option(
        (),
        "Longer",
        "Chunks that a chunk of a stream sees, any of frames, which are latent ones of a chunk, "
        "window, sink, middle, remembered and noise, as window=6,noise=0. Default: as the LoRA or "
        "the published weights were trained.",
        metavar="FIELD=VALUE[,FIELD=VALUE]",
        commas=True,
    )

    @model_validator(mode="after")
    def _names_zones(self) -> "Self":
        read_zones(self.zones)
        return self

    def check_zones(self, *, stream: bool) -> None:
        """Refuse zones of a video that is made as a whole."""
        if self.zones and not stream:
            raise ValueError("--zones is of a stream: add --stream")


class MethodChoice(Config):
    """A method, or a preset in its place."""

    method: MethodWords = option(
        None,
        "Attention",
        "Method of `gen-accel list`, also of published weights, or module:Class of your own. "
        "Default: that of --preset.",
        metavar="NAME",
        choices=(*registry.METHODS, *published.METHODS),
        form="Rule by which pairs of tokens are left out.",
    )
    set: tuple[str, ...] = option(
        (),
        "Attention",
        "Option of the method; may be repeated.",
        metavar="FIELD=VALUE",
        form="Option of the method, as field=value.",
    )
    preset: PresetWords = option(
        None,
        "Attention",
        "Preset in place of a method: a file of `gen-accel tune`, or quality, balanced, fast, "
        f"tuned for the model and this size, or else a rule. Default: {registry.PRESET}.",
        metavar="FILE|NAME",
        choices=registry.PRESETS,
        reads=preset_files,
        form="Preset in place of a method: quality, balanced, fast, or the file of a tuning.",
    )

    def inputs(self) -> dict[str, list[Path]]:
        found = super().inputs()
        return {**found, "preset": [x for path in found["preset"] for x in with_profile(path)]}

    @property
    def chosen_preset(self) -> "PresetWords":
        """The preset; `registry.PRESET` where no method is chosen either."""
        return registry.PRESET if self.preset is None and self.method is None else self.preset

    def check_method(self, steps: int | None = None) -> None:
        """Refuse unknown names, a method beside a preset, and options without a method.

        Args:
            steps: number of steps that are asked for.
        """
        named = [n for n in ("method", "set") if self.is_given(n)]
        if self.preset is not None and named:
            told = self.preset if isinstance(self.preset, str | Path) else "PRESET"
            wrong = " and ".join(f"--{name}" for name in named)
            raise ValueError(
                f"--preset {told} takes the place of --method and --set: leave {wrong} out"
            )
        if self.set and self.method is None:
            raise ValueError(
                f"--set {shown(self.set[0])} is of a method: add --method, of `gen-accel list`"
            )
        if isinstance(self.method, str):
            registry.check_method(self.method)
        if isinstance(self.preset, str | Path):
            check_preset(self.preset, steps)

    def built_method(self) -> "Method":
        """Build the method that is chosen. Errors begin with the option as typed."""
        method = registry.WITHOUT_REST if self.method is None else self.method
        if not isinstance(method, str):
            return method
        from gen_accel.attention_processors.methods.registry import method_from

        try:
            return method_from(method, self.set)
        except ValueError as error:
            about = [one for one in self.set if one.partition("=")[0].strip() in str(error)]
            typed = " ".join(f"--set {one}" for one in about)
            raise ValueError(f"{typed}: {error}" if typed else str(error)) from error


class LinearChoice(Config):
    """How the layers beside attention run."""

    linear_kernel: LinearKernel = option(
        "auto",
        "Attention",
        "Kernel of the linear layers in fp32 on a CPU, with the same results to rounding; auto: "
        "onednn where it is clearly faster.",
    )


class MethodConfig(MethodChoice):
    """The method that is attached, and what stays dense."""

    dense_start: float = option(
        0.0, "Attention", "Share of the steps that stay dense, from the second on, 0 to 1."
    )
    dense_end: float = option(
        0.0, "Attention", "Share of the steps that stay dense at the end, 0 to 1."
    )
    dense_steps: int = option(0, "Attention", "Number of steps that stay dense at the start.")
    dense_layers: int | tuple[int, ...] = option(
        0, "Attention", "Number of first layers that stay dense, or numbers of layers: 0,7."
    )

    def built_schedule(self) -> "Schedule | None":
        """Build the schedule; None if no field of it is given."""
        names = [name for name in SCHEDULE if name in type(self).model_fields]
        if not any(map(self.is_given, names)):
            return None
        from gen_accel.attention_processors.attached.schedule import Schedule

        return Schedule(**{SCHEDULE[name]: getattr(self, name) for name in names})


class GenerateConfig(
    ZonesConfig,
    Loading,
    ImagePromptConfig,
    ConditioningFiles,
    MethodConfig,
    LinearChoice,
    Clip,
    Videos,
    Outputs,
):
    """All that `generate` takes."""

    VERB = "generate"
    RIVALS = (
        (("method", "set"), ("preset", "from_lora")),
        (("preset", "from_lora"), ("method", "set")),
        (("prompt", "prompts"), ("prompt", "prompts")),
        (("frames",), ("seconds",)),
        (("seconds",), ("frames",)),
        (("image_prompt",), ("image_mask",)),
    )

    call: tuple[str, ...] = option(
        (),
        "Clip",
        "Argument of the pipeline's own call that no other option sets, as ar_step=5; may be "
        "repeated.",
        metavar="NAME=VALUE",
        form="Argument of the pipeline's own call, as ar_step=5.",
    )
    from_lora: Path | None = option(
        None,
        "Attention",
        "LoRA of `gen-accel train`, loaded with the attention that it was trained with.",
        metavar="DIR",
        form="LoRA that is loaded with the attention that it was trained with.",
    )
    seconds: float | None = option(
        None,
        "Clip",
        "Length in seconds, in place of a number of frames: the nearest number that the model "
        "makes, at FPS or its own frame rate.",
        gt=0,
        le=LONGEST,
        kept=False,
        form="Length in seconds, in place of a number of frames: the nearest that the model "
        "makes.",
    )
    kernel: str = option(
        "auto",
        "Attention",
        "Kernel of the sparse attention; a named one never falls back to another.",
        metavar="NAME",
        choices=KERNELS,
    )
    dense_kernel: str | None = option(
        "auto",
        "Attention",
        "Kernel of the dense steps and layers; auto: the fastest as exact as the model's own "
        "attention, which is called own.",
        metavar="NAME",
        choices=(OWN, *KERNELS),
    )
    cache: str | None = option(
        None,
        "Attention",
        "Cache that skips most of the model at steps like the last: first_block or sea, with how "
        "much may change, or taylorseer, with every how many steps to compute. Default: none.",
        metavar="NAME[:NUMBER]",
        choices=tuple(registry.CACHES),
        form="Cache that skips most of the model at steps like the last; also with how much may "
        "change, as sea:0.3. Default: none.",
    )
    dense_at: tuple[int, ...] = option(
        (), "Attention", "Numbers of further dense steps, from 0; negative ones from the end."
    )
    dense_noise: tuple[float, float] | None = option(
        None, "Attention", "Range of noise levels with dense steps, high,low: 1 is pure noise."
    )
    extend: Literal["none"] | tuple[str, ...] | None = option(
        None,
        "Longer",
        "Techniques for video longer than the model's, as riflex or riflex:k=4. Default: those of "
        "--from-lora; none turns them off.",
        metavar="TECHNIQUE[,TECHNIQUE]",
        choices=registry.TECHNIQUES,
        commas=True,
        form="Techniques for video longer than the model's, also with settings, as riflex:k=4. "
        "Default: those of the LoRA, or none.",
    )
    trained_frames: int | None = option(
        None, "Longer", "Number of frames that the model was trained on, if it is not known.", ge=1
    )
    stream: bool = option(
        False,
        "Longer",
        "A video of any length, chunk by chunk, at constant memory, which plays while it is made; "
        "for a LoRA of objective causal. Further prompts hold from a frame on: 300:a cat sleeps.",
        form="A video of any length, chunk by chunk, at constant memory; for a LoRA that was "
        "trained so.",
    )
    resume: bool = option(
        False,
        "Longer",
        "Continuation of a stream that was stopped, or of one with fewer frames.",
        kept=False,
    )
    compare: bool = option(
        False, "Measuring", "A dense video too, and a report of the difference.", kept=False
    )
    metrics: tuple[str, ...] | None = option(
        None,
        "Measuring",
        "Metrics beside PSNR and SSIM: lpips, vmaf, cvvdp. Default: lpips and vmaf, if they can "
        "be computed.",
        metavar="NAME[,NAME]",
        choices=registry.METRICS,
        commas=True,
        kept=False,
    )
    timed: bool = option(
        False,
        "Measuring",
        "Seconds spent in attention, printed too.",
        kept=False,
        form="Seconds spent in attention too.",
    )
    preview: int | None = option(
        None,
        "Output",
        "Number of steps between two previews at OUT's .preview.png. Default: no previews.",
        metavar="N",
        ge=1,
        kept=False,
        form="Number of steps between two previews. Default: no previews.",
    )
    save_latents: Path | None = option(
        None,
        "Output",
        "File for the latents, .safetensors; not of every model.",
        metavar="FILE",
        kept=False,
        writes=True,
    )
    from_latents: Path | None = option(
        None,
        "Output",
        "File of --save-latents to decode, in place of a generation.",
        metavar="FILE",
        kept=False,
    )
    keep_settings: bool = option(
        True,
        "Output",
        "Settings in each file, prompts and paths included, for --from-settings.",
        name="settings",
        kept=False,
    )
    ray: str | None = option(
        None,
        "Ray",
        "Address of a Ray cluster that makes the videos, HOST:PORT. Without an address: the "
        "one of this machine, or this machine alone.",
        metavar="[ADDRESS]",
        bare="auto",
        kept=False,
    )
    ray_workers: int | None = option(
        None,
        "Ray",
        "Number of Ray workers. Default: one for each GPU, or each machine without GPUs.",
        metavar="N",
        ge=1,
        kept=False,
    )

    @property
    def chosen_preset(self) -> "PresetWords":
        """The preset; none by default with a LoRA, which brings its own method, and with a
        technique that dampens scores, which has `registry.WITHOUT_REST`."""
        alone = self.from_lora is not None or self._dampening() is not None or self.stream
        return self.preset if alone else super().chosen_preset

    def _dampening(self) -> str | None:
        """Return the first technique that dampens scores; None if there is none."""
        words = (registry.split_technique(name)[0] for name in self.techniques or ())
        return next((word for word in words if word in registry.DAMPENING), None)

    @property
    def techniques(self) -> tuple[str, ...] | None:
        """Techniques for longer video; None for those of a LoRA."""
        return () if self.extend == "none" else self.extend

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts, of the file too."""
        return (*self.prompt, *(() if self.prompts is None else read_prompts(self.prompts)))

    @property
    def is_list(self) -> bool:
        """Whether the videos are numbered, of several prompts or of a file."""
        return not self.stream and (self.prompts is not None or len(self.prompt) > 1)

    @property
    def target(self) -> Path:
        """Place of the video: OUT, or if that is the default and there already, the next number
        that is free."""
        if self.is_given("out") or self.is_list or self.overwrite or self.resume:
            return self.out
        return free_name(self.out)

    def outputs(self) -> dict[str, list[Path]]:
        found = super().outputs()
        is_there = self.prompts is None or expanded(self.prompts).is_file()
        many = len(self.texts) if self.is_list and is_there else 0
        targets = numbered(self.out, many) if many else [self.target]
        found["out"] = [path for target in targets for path in self.files_of(target).values()]
        if self.resume:  # the film goes on, and may be read for its settings
            found["out"].remove(self.target)
        if many and self.save_latents is not None:
            found["save_latents"] = numbered(self.save_latents, many)
        return found

    def new_outputs(self) -> dict[str, list[Path]]:
        return {} if self.is_list or self.resume else self.outputs()

    def files_of(self, target: Path) -> dict[str, Path]:
        """Return the files that making the video at `target` writes, by their kind."""
        found = {"video": target}
        if self.compare:
            found |= comparison_files(target)
        if self.is_list:
            found["record"] = record_of(target)
        if self.stream:
            found["chunks"] = target.with_suffix(CHUNKS)
        if self.preview is not None:
            found["preview"] = preview_of(target)
        return found

    def check(self) -> None:
        """Refuse what does not go together, and files that are missing or cannot be written.

        Raises:
            ValueError, OSError: a fault that is found without torch.
        """
        check_video_path(self.out)
        check_output(self.save_latents, ".safetensors")
        check_pipeline(self.model)
        if self.from_latents is not None:
            others = ("model", "out", "overwrite", "fps", "dtype", "device", "offload")
            self.check_only("from_latents", *others)
            check_files("file of latents", self.from_latents)
            return
        check_length(self.frames, self.seconds)
        self._check_stream()
        self.check_method(self.steps)
        for word in self.call:
            if "=" not in word:
                raise ValueError(f"call is NAME=VALUE, as ar_step=5, got {shown(word)}")
        for what, kernel in (("kernel", self.kernel), ("dense_kernel", self.dense_kernel)):
            if kernel not in (None, OWN):
                registry.check_kernel(kernel, what)
        check_files("LoRA", self.from_lora)
        techniques = self.techniques or ()
        registry.check_techniques(techniques)
        self.check_sampling()
        if self.preset is not None and (technique := self._dampening()):
            raise ValueError(
                f"{technique} dampens scores, which a preset does not take: leave preset "
                f"{shown(str(self.preset))} out, or choose another technique"
            )
        if self.cache is not None:
            registry.split_cache(self.cache)
        self.check_loras()
        self.check_quantised()
        check_files("file of prompts", self.prompts)
        self._check_comparison(techniques)
        if self.trained_frames is not None and not techniques and self.from_lora is None:
            raise ValueError(
                f"trained_frames is for a technique, got {self.trained_frames} and none"
            )
        self.check_inputs(techniques)
        self.check_image_prompt()
        cluster_of(self.ray, self.ray_workers, self.device)

    @property
    def own_sampler(self) -> str | None:
        """The first technique that samples by itself; None if there is none."""
        names = self.techniques or ()
        return next((x for x in names if registry.split_technique(x)[0] == FRESH), None)

    def check_sampling(self) -> None:
        """Refuse a sampler beside a technique that is one."""
        if self.sampling is not None and (name := self.own_sampler):
            raise ValueError(
                f"{name} samples by itself: leave sampler, levels and shift out, or give its "
                f"shift as {FRESH}:shift=22"
            )

    def _check_stream(self) -> None:
        self.check_zones(stream=self.stream)
        if not self.stream:
            if self.resume:
                raise ValueError("--resume is of a stream: add --stream")
            return
        if self.out.suffix.lower() != ".mp4":
            raise ValueError(f"a stream is an .mp4, got --out {self.out}")
        if self.sampler not in (None, "euler", "lcm"):
            raise ValueError(f"a stream is sampled by euler or lcm, got --sampler {self.sampler}")
        unfit = ("prompts", "preset", "cache", "compare", "preview", "save_latents", "image")
        unfit += ("last_image", "video", "image_prompt", "ray", "dense_noise", "call")
        extended = ("extend",) if self.techniques else ()  # "none" is no technique
        for name in (*extended, *filter(self.is_given, unfit)):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is for a video that is made as a whole, got a stream: leave it out"
            )

    def _check_comparison(self, techniques: Sequence[str]) -> None:
        if not self.compare:
            if self.metrics is not None:
                raise ValueError(f"metrics go with compare, got {', '.join(self.metrics)} without")
            return
        registry.check_metrics(self.metrics)
        if self.from_lora is not None:
            raise ValueError(
                f"compare does not go with from_lora {self.from_lora}, whose positions and "
                "techniques the dense clip would lack: give the LoRA by lora, with a method or "
                "preset"
            )
        if techniques or self.save_latents is not None:
            raise ValueError(
                "compare goes with neither long-video techniques nor saved latents, got "
                f"{', '.join(techniques) or self.save_latents}"
            )
        if self.preview is not None:
            raise ValueError(
                f"compare measures times, which previews add to: leave preview {self.preview} out"
            )


def values_of_clip(clip: Clip) -> dict[str, Any]:
    """Return the fields of a `Clip` alone, of a config that has more, as JSON holds them."""
    return plain({name: getattr(clip, name) for name in Clip.model_fields})


def check_length(frames: int | None, seconds: float | None) -> None:
    """Raise ValueError for a length that is given twice."""
    if frames is not None and seconds is not None:
        raise ValueError(
            f"seconds {seconds:g} take the place of frames {frames}: leave one of the two out"
        )


def check_preset(preset: str | Path, steps: int | None = None) -> None:
    """Raise FileNotFoundError for a preset that is neither a name nor there, ValueError for a file
    that holds none or was solved for another number of steps."""
    if str(preset) in registry.PRESETS:
        return
    path = expanded(preset)
    check_input(path)
    if not path.is_file():
        known = ", ".join(registry.PRESETS)
        hint = registry.nearest_to(preset, registry.PRESETS)
        raise FileNotFoundError(f"no preset at {preset}; the names of presets are {known}{hint}")
    held = read_fields(path)
    if held.get("gen_accel") != "preset":
        raise ValueError(f"{preset} is no preset: gen-accel tune writes one")
    solved = held.get("steps")
    if steps is not None and isinstance(solved, int) and solved != steps:
        raise registry.other_steps(preset, solved, steps)


def prompts_of(texts: Sequence[str]) -> dict[int, str]:
    """Read prompts, the first from frame 0 and others as "300: a cat sleeps". ValueError for
    frames that do not rise, or a second prompt without one."""
    found: dict[int, str] = {}
    for place, text in enumerate(texts):
        timed = TIMED.fullmatch(text) if len(texts) > 1 else None
        if timed is None and place:
            raise ValueError(
                f"prompt {place + 1} of a stream needs the frame from which it holds, as "
                f'"300: {text[:40]}", got {shown(text)}'
            )
        frame, words = (0, text) if timed is None else (int(timed[1]), timed[2])
        if found and frame <= max(found):
            raise ValueError(f"prompts of a stream rise in frames, got {frame} after {max(found)}")
        found[frame] = words
    return found


def parts_of(text: str) -> dict[int, str]:
    """Cut a text whose lines all begin with a frame, as "48: a cat sleeps", into its parts, by the
    frames from which they hold; another text has one, from frame 0. ValueError for frames that do
    not rise from 0."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or not all(map(TIMED.fullmatch, lines)):
        return {0: text}
    parts = prompts_of(lines)
    if 0 not in parts:
        raise ValueError(f"a text that changes begins at frame 0, got {shown(lines[0])}")
    return parts


def read_prompts(path: str | Path) -> list[str]:
    """Read the lines of a text file that are not blank.

    Raises ValueError for a file without such lines, or with one that is too long or not UTF-8.
    """
    # Not by `splitlines`, which splits at characters that a prompt may hold, such as U+2028.
    lines = read_text(path).split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one on each line")
    for number, prompt in enumerate(prompts, 1):
        check_text(f"prompt {number} of {path}", prompt, registry.MOST_PROMPT)
    return prompts
