"""The config of a finetuning: one flat list of fields, from YAML, flags or Python."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from gen_accel.config_files import Field, as_yaml, checked, read_mapping
from gen_accel.paths import expanded

Rule = Literal["none", "riflex", "position_interpolation"]


@dataclass(frozen=True)
class Stage:
    """A part of the length curriculum.

    Args:
        frames: pixel frames, not latent frames.
        steps: optimizer steps.
        rope: rule for the temporal rotary frequencies if `frames` exceeds the length that the
            model was trained on; see `gen_accel.extend`.
    """

    frames: int
    steps: int
    rope: Rule = "none"

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Read a stage from text such as "161:600" or "161:600:riflex"."""
        parts = [part.strip() for part in str(text).split(":")]
        if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts[:2]):
            raise ValueError(
                "a stage is written frames:steps or frames:steps:rule, in quotes in YAML, as "
                f'"161:600:riflex", got {text!r}'
            )
        rule: Any = parts[2] if len(parts) == 3 else "none"
        if rule not in get_args(Rule):
            raise ValueError(f"the rule of a stage must be one of {get_args(Rule)}, got {rule!r}")
        if not int(parts[0]) or not int(parts[1]):
            raise ValueError(f"a stage needs at least one frame and one step, got {text!r}")
        return cls(int(parts[0]), int(parts[1]), rule)

    def __str__(self) -> str:
        rule = "" if self.rope == "none" else f":{self.rope}"
        return f"{self.frames}:{self.steps}{rule}"


def _(default: Any, group: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """All fields of a finetuning. `--help` and `--print-config` show the `help` of each field."""

    model: str = _("demo", "What", "Folder or hub repository of the pipeline; demo: the embedded.")
    data: str | None = _(None, "What", "Videos with captions, a manifest, or a datasets folder.")
    cache: str | None = _(None, "What", "Folder of cached latents. Without: OUT/cache.")
    out: str = _(
        "outputs/lora", "What", "Folder for what is trained, its checkpoints, logs and videos."
    )
    adapter: Literal["lora", "image_prompt"] = _(
        "lora", "What", "image_prompt: the model stays as it is and learns to follow an image."
    )
    part: Literal["transformer", "transformer_2", "both"] = _(
        "transformer",
        "What",
        "Transformer to train, of a model with two: transformer is for high noise, transformer_2 "
        "for low; both: one run after the other.",
    )
    condition: Literal["text", "first_frame"] | None = _(
        None,
        "What",
        "What a clip is made from beside its caption: first_frame is the clip's own; none: as the "
        "model's pipeline makes videos.",
    )
    first_frame_dropout: float = _(
        0.0,
        "What",
        "Share of the clips shown without their first frame, for models that also make videos "
        "from text alone.",
    )

    height: int = _(480, "Clips", "Pixels, after resizing and a crop to the middle.")
    width: int = _(832, "Clips", "Pixels.")
    sizes: tuple[str, ...] = _(
        (),
        "Clips",
        "Several, as 480x832, height first: a clip takes the nearest shape. Height and width are "
        "then those of the videos sampled, and the first of sizes unless given.",
    )
    fps: float | None = _(
        16.0, "Clips", "Frames a second that clips are resampled to; none: kept."
    )
    on_broken: Literal["skip", "stop"] = _(
        "skip", "Clips", "What a file that no one can read does."
    )
    workers: int = _(
        2, "Clips", "Threads that read clips ahead of the encoder; 0: it waits for each clip."
    )
    take: Literal["start", "middle", "all", "random"] = _(
        "start", "Clips", "Of a clip that is longer than a stage; all: chunks one after the other."
    )
    chunks: int = _(1, "Clips", "Of take random: chunks a clip or scene, at places by its hash.")
    scenes: Literal["off", "cut"] = _(
        "off", "Clips", "cut: no chunk crosses a cut; needs gen_accel[scenes]."
    )
    images: float = _(
        0.0, "Clips", "Share of the steps that show pictures, as clips of 1 frame, in any stage."
    )
    held_out: float = _(
        0.0,
        "Clips",
        "Clips that never train, whose loss shows what is learnt: a number, or a share below 1.",
    )
    repeats: tuple[str, ...] = _(
        (), "Clips", "How often clips are shown, PATTERN=NUMBER each, as people/*=3; else 1."
    )

    trigger: str | None = _(None, "Captions", "Word before every caption that does not hold it.")
    prefix: str | None = _(None, "Captions", "Text before every caption, as it is.")
    default_caption: str | None = _(
        None, "Captions", "Of clips without one; none: they are refused."
    )
    shuffle_tags: int | None = _(
        None,
        "Captions",
        "Tags, with commas between, change order behind this many; none: they do not.",
    )
    tag_orders: int = _(4, "Captions", "Of shuffle_tags: orders of each caption, one a step.")
    max_tokens: int | None = _(None, "Captions", "Length of the text; none: the pipeline's own.")

    stages: tuple[str, ...] = _(
        ("81:200", "161:600"),
        "Length",
        "Curriculum, frames:steps[:rule] each. Rules: riflex, position_interpolation.",
    )
    trained_frames: int | None = _(
        None, "Length", "Frames that the model was trained on; none: what is known of it."
    )

    method: str = _(
        "radial", "Attention", "See `gen-accel list`, or module:Class; dense: without."
    )
    settings: tuple[str, ...] = _((), "Attention", "Fields of the method, field=value each.")
    kernel: str = _("auto", "Attention", "auto, or a name that never falls back to another.")
    dense_layers: int = _(2, "Attention", "How many of the first blocks stay dense.")
    dense_steps: int = _(
        2, "Attention", "First steps of a generation that stay dense; kept beside the LoRA."
    )

    rank: int = _(128, "LoRA", "0 with train_processors: their parameters alone.")
    alpha: float | None = _(None, "LoRA", "Its weight is alpha / rank; none: the rank.")
    targets: tuple[str, ...] = _(
        ("attention",), "LoRA", "attention, feed_forward, or endings of names of linear layers."
    )
    lora_dropout: float = _(0.0, "LoRA", "Share of the inputs of a LoRA that are dropped.")
    dora: bool = _(
        False, "LoRA", "Train the length of each row of the weights apart from its direction."
    )
    rank_stabilised: bool = _(
        False, "LoRA", "The LoRA's weight is alpha / sqrt(rank): high ranks train as fast as low."
    )
    train_processors: bool = _(
        True, "LoRA", "Train what the method itself has: proj and alpha of sparse_linear."
    )
    init_lora: str | None = _(
        None,
        "LoRA",
        "Folder of a LoRA to go on from, with a new optimizer: of this rank or lower, on these "
        "targets or fewer.",
    )

    image_encoder: str | None = _(
        None,
        "Image prompt",
        "Folder or hub repository of a CLIP vision model; none: a small encoder is trained along.",
    )
    image_features: Literal["embedding", "patches"] = _(
        "patches", "Image prompt", "What of image_encoder: as in IP-Adapter, or IP-Adapter Plus."
    )
    image_tokens: int = _(4, "Image prompt", "That an image is turned into.")
    image_size: int = _(32, "Image prompt", "Pixels a side that the small encoder sees.")
    image_dropout: float = _(0.05, "Image prompt", "Share of the clips shown without an image.")
    init_adapter: str | None = _(
        None, "Image prompt", "An adapter to go on from, with a new optimizer."
    )
    objective: Literal["flow", "distill", "distill_attention"] = _(
        "flow",
        "Loss",
        "flow: the model's own; distill: what the dense model predicts, and for an image prompt "
        "what it predicts without an image from the clip's teacher_caption; distill_attention: "
        "what each attention to the text gives from that caption.",
    )
    teacher_guidance: float = _(
        1.0,
        "Loss",
        "distill: guidance scale of the teacher; above 1 the LoRA holds the guidance, and "
        "generates without, in half the time.",
    )
    teacher_lora: str | None = _(
        None,
        "Loss",
        "distill: folder of a LoRA that the teacher has, with the attention that it was trained "
        "with; none: the model as it came.",
    )
    timestep_sampling: Literal["logit_normal", "uniform"] = _(
        "logit_normal", "Loss", "How noise levels are drawn, before the shift."
    )
    logit_mean: float = _(0.0, "Loss", "Of logit_normal.")
    logit_std: float = _(1.0, "Loss", "Of logit_normal.")
    shift: float | None = _(None, "Loss", "Of the noise levels; none: the scheduler's.")
    sampled_steps: int | None = _(
        None,
        "Loss",
        "For a step-distilled model: train at the noise levels of so many denoising steps alone; "
        "none: at all.",
    )
    noise_levels: tuple[float, ...] = _(
        (), "Loss", "The same by the levels themselves, from 0 to 1, as 1.0 0.757 0.522."
    )
    huber: float | None = _(
        None,
        "Loss",
        "Width of the pseudo-Huber loss: errors above it count by their size, not its square; "
        "none: mean squared error.",
    )
    weighting: Literal["none", "cosmap", "min_snr"] = _(
        "none",
        "Loss",
        "Weights of noise levels: cosmap of flow matching (SD3), min_snr of v-prediction "
        "(CogVideoX).",
    )
    min_snr: float = _(5.0, "Loss", "Of min_snr: the signal-to-noise ratio where it cuts.")
    caption_dropout: float = _(0.1, "Loss", "Share of the clips that are shown without a caption.")

    masks: bool = _(
        False,
        "Loss",
        "The loss counts by clip.mask.mp4 or .png beside clip.mp4, or the column mask: white "
        "fully, black as mask_floor.",
    )
    mask_floor: float = _(0.0, "Loss", "masks: how much counts what is black, 0 to 1.")

    batch_size: int = _(1, "Optimizer", "Clips a process and micro-step.")
    gradient_accumulation: int = _(1, "Optimizer", "Micro-steps a step.")
    optimizer: str = _(
        "adamw", "Optimizer", "adamw, adamw8bit, or module.Class, as prodigyopt.Prodigy."
    )
    optimizer_settings: tuple[str, ...] = _(
        (), "Optimizer", "Arguments of the optimizer, field=value each, as d_coef=0.5."
    )
    learning_rate: float = _(1e-4, "Optimizer", "After the warm-up.")
    betas: tuple[float, float] = _(
        (0.9, 0.99), "Optimizer", "Of AdamW; of another optimizer only if given."
    )
    weight_decay: float = _(0.0, "Optimizer", "Of AdamW; of another optimizer only if given.")
    schedule: Literal["constant", "cosine", "linear"] = _(
        "constant", "Optimizer", "How the learning rate goes after the warm-up."
    )
    warmup_steps: int = _(20, "Optimizer", "Steps over which the learning rate rises.")
    max_grad_norm: float = _(1.0, "Optimizer", "Longer gradients are shortened to this; 0: not.")
    ema_decay: float = _(
        0.0, "Optimizer", "Of the average that is kept in the end, as 0.99; 0: none."
    )

    mixed_precision: Literal["no", "bf16", "fp16"] = _("bf16", "Machine", "no: float32.")
    device: str = _("auto", "Machine", "auto or cpu; `accelerate launch` says the rest.")
    seed: int = _(0, "Machine", "Of all that is drawn.")
    context_parallel: int = _(
        1, "Machine", "Processes that share a clip, each with some of its tokens."
    )

    base: Literal["bf16", "fp8", "int8", "nf4"] | None = _(
        None, "Memory", "How the model's frozen weights are held; none: in mixed_precision."
    )
    blocks_to_swap: int = _(
        0, "Memory", "Blocks that wait in CPU memory until their turn; needs checkpointing."
    )
    gradient_checkpointing: Literal["off", "on", "offload"] = _(
        "off",
        "Memory",
        "on: less memory, about a third more time; offload: what it keeps goes to CPU memory.",
    )
    checkpoint_parts: bool = _(
        False,
        "Memory",
        "Attentions and feed-forward of a block keep their inputs alone too: about a quarter more "
        "time; needs gradient_checkpointing.",
    )

    checkpoint_every: int = _(100, "Keeping", "Steps.")
    keep_checkpoints: int = _(2, "Keeping", "Older ones are deleted.")
    log_with: Literal["tensorboard", "wandb", "none"] = _(
        "tensorboard", "Keeping", "OUT/metrics.jsonl is written in any case."
    )
    loss_every: int = _(
        0,
        "Keeping",
        "Steps between two losses of the clips held out, or else of 8 that train, at fixed noise; "
        "0: none.",
    )
    validate_every: int = _(0, "Keeping", "Steps; 0: no videos are sampled.")
    validation_prompts: tuple[str, ...] = _((), "Keeping", "One video each, seeds from 0.")
    validation_images: tuple[str, ...] = _(
        (),
        "Keeping",
        "Files, one for each validation prompt: image prompts, or first frames; none: those of "
        "the first clips.",
    )
    validation_frames: int | None = _(None, "Keeping", "None: of the longest stage.")
    validation_steps: int = _(20, "Keeping", "Denoising steps.")
    sample_with: tuple[str, ...] = _(
        (),
        "Keeping",
        "Techniques of `gen_accel.extend` for videos longer than trained_frames: of the videos "
        "sampled, and from then on wherever generate --from-lora takes this LoRA.",
    )
    guidance_scale: float | None = _(
        None, "Keeping", "Of the videos sampled; none: 5, or 1 where the LoRA holds the guidance."
    )

    def __post_init__(self) -> None:
        from gen_accel.lora.checks import check

        for one in fields(self):
            if isinstance(getattr(self, one.name), list):
                object.__setattr__(self, one.name, tuple(getattr(self, one.name)))
        for name in ("out", "cache"):
            if getattr(self, name) is not None:
                folder = str(expanded(getattr(self, name)))
                object.__setattr__(self, name, folder)
        if isinstance(self.gradient_checkpointing, bool):  # as configs said before
            word = "on" if self.gradient_checkpointing else "off"
            object.__setattr__(self, "gradient_checkpointing", word)
        if self.sizes and not (self.is_given("height") or self.is_given("width")):
            for name, side in zip(("height", "width"), self.clip_sizes[0], strict=True):
                object.__setattr__(self, name, side)
        check(self)

    def is_given(self, name: str) -> bool:
        """Whether a field is other than its default."""
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def replaced(self, **changed: Any) -> "TrainConfig":
        """Return a config with other values of some fields."""
        return replace(self, **changed)

    @property
    def checkpoints_activations(self) -> bool:
        return self.gradient_checkpointing != "off"

    @property
    def clip_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels that clips are cut to."""
        if not self.sizes:
            return ((self.height, self.width),)
        from gen_accel.lora.data.clips import parse_sizes

        return parse_sizes(",".join(self.sizes))

    @property
    def clip_lengths(self) -> list[int]:
        """Pixel frames of the steps, ascending."""
        return sorted(
            {stage.frames for stage in self.curriculum} | ({1} if self.images else set())
        )

    @property
    def reads_teacher_captions(self) -> bool:
        return self.adapter == "image_prompt" and self.objective != "flow"

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        return tuple(Stage.parse(text) for text in self.stages)

    def stage_at(self, step: int) -> tuple[int, Stage, int]:
        """Return a step's stage: its number, the stage, and the step's index within the stage."""
        for number, stage in enumerate(self.curriculum):
            if step < stage.steps:
                return number, stage, step
            step -= stage.steps
        raise IndexError(step)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.curriculum)

    @property
    def longest(self) -> int:
        """Frames of the longest stage."""
        return max(stage.frames for stage in self.curriculum)


# Fields that may differ between a run and its continuation: the training depends on none of them.
FREE_TO_CHANGE = (
    "data",
    "cache",
    "out",
    "teacher_lora",  # its path; its weights are compared by their hash
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "log_with",
    "loss_every",
    "validate_every",
    "validation_prompts",
    "validation_images",
    "validation_frames",
    "validation_steps",
    "sample_with",
    "guidance_scale",
    "on_broken",
    "workers",
    "kernel",
    "context_parallel",
    "gradient_checkpointing",
    "checkpoint_parts",
    "blocks_to_swap",
)


def read_config(
    path: str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> TrainConfig:
    """Read a config from a YAML file; `overrides` take precedence over it, and it over `preset`.

    Raises:
        FileNotFoundError, ValueError: see `read_values`; also a value that `TrainConfig` refuses.
    """
    return TrainConfig(**read_values(path, overrides, preset))


def read_values(
    path: str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """Read the fields that a YAML file and `overrides` give, converted to their types, and fill
    them up with a preset's.

    No heavy library is imported, unless the stages of preset longer depend on the model.

    Args:
        preset: see `presets.preset`; a file may name one too, as `preset: style`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping, a field is unknown (the error names the nearest),
            or a value has the wrong type; an unknown preset, or one that does not fit.
    """
    from gen_accel.lora.presets import with_preset

    given = {} if path is None else read_mapping(path, verb="train", extra="train")
    named = given.pop("preset", None)
    given.update(overrides or {})
    values = checked(config_fields(), given, extra="train", typed=overrides or ())
    name = named if preset is None else preset
    return values if name is None else with_preset(str(name), values)


def config_fields() -> list[Field]:
    """Fields of `TrainConfig`, as a file or a command line gives them."""
    hints = get_type_hints(TrainConfig)
    return [
        Field(one.name, hints[one.name], one.default, one.metadata["help"], one.metadata["group"])
        for one in fields(TrainConfig)
    ]


def print_config(config: TrainConfig | None = None) -> str:
    """Return a YAML file of all fields, each with its help as a comment."""
    return as_yaml(config_fields(), vars(config or TrainConfig()), extra="train")


def differences(config: TrainConfig, earlier: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find changed fields that the training depends on: name to (earlier, now)."""
    found = {}
    for one in fields(TrainConfig):
        if one.name in FREE_TO_CHANGE:
            continue
        now = getattr(config, one.name)
        before = earlier.get(one.name, one.default)
        before = tuple(before) if isinstance(before, list) else before
        if now != before:
            found[one.name] = (before, now)
    return found
