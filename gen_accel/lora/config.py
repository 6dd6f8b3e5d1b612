"""The config of a finetuning: one flat list of fields, from YAML, flags or Python.

It checks types, limits, and fields that do not go together. What a field names is checked by the
part that it is for, when that is built. Imports nothing heavy.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from gen_accel import registry
from gen_accel.config import Config, option
from gen_accel.hub import check_pipeline, check_sources, check_subject
from gen_accel.lora.data.clips import (
    MOST_PIXELS,
    CaptionedVideo,
    Captions,
    ClipRule,
    Dataset,
    Take,
    parse_repeats,
    parse_sizes,
    why_clips,
)
from gen_accel.lora.experts import BOTH, NOISE, check_parts, folder_of
from gen_accel.parsing import shown
from gen_accel.paths import (
    adapter_named,
    check_files,
    check_folder_path,
    check_input,
    expanded,
    model_files,
)
from gen_accel.pipelines.zones import Middle, Zones
from gen_accel.served import DEMO, RUNS

Rule = Literal["none", "riflex", "position_interpolation"]
RULES: tuple[Rule, ...] = get_args(Rule)
Condition = Literal["text", "first_frame", "last_frame", "control"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
# Shares of clips shown without a frame, to the conditions that they are for.
DROPOUTS: dict[str, tuple[Condition, ...]] = {
    "first_frame_dropout": ("first_frame", "last_frame"),
    "last_frame_dropout": ("last_frame",),
}
LOGS, CHECKPOINTS = "logs", "checkpoints"  # folders of OUT
CAUSAL = "causal"  # objective
OPTIMIZERS = ("adamw", "adamw8bit")
# Package that a way to hold the base, or an optimizer, needs.
PACKAGES = {**registry.QUANTISERS, "adamw8bit": "bitsandbytes"}
PRECISIONS: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "no": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
# What the embedded model trains with where nothing is said: it knows no other pictures, and a CPU
# may multiply in bfloat16 ten times slower.
OF_DEMO: dict[str, Any] = {
    "height": RUNS[DEMO].height,
    "width": RUNS[DEMO].width,
    "stages": (f"{RUNS[DEMO].frames}:200",),
    "mixed_precision": "no",
}
MOST_LAYERS = 1000  # more than any model has
MOST_WORKERS = 256  # threads, each with a clip in memory
MOST_RATE = 1e3  # a larger learning rate trains nothing, long before float32 overflows
SEEDS = 2**32
# Fields of earlier versions, and what to do.
GONE = {
    "switch_every": "part both trains one expert after the other, so leave it out",
    "high_noise_steps": "stages are for each expert of part both, so leave it out",
    "both_dropout": "image_dropout and caption_dropout are drawn each by itself, so raise these "
    "and leave it out",
    "preset": "configs/lora has a file for each purpose, as longer.yaml, so start from one",
}


@dataclass(frozen=True)
class Stage:
    """A part of the length curriculum.

    Args:
        frames: pixel frames, not latent frames.
        steps: optimizer steps; 0 where they follow from `epochs`.
        rope: rule for the temporal rotary frequencies if `frames` exceeds the length that the
            model was trained on; see `gen_accel.extend`.
        epochs: times that each clip is shown; 0 where steps are given.
    """

    frames: int
    steps: int
    rope: Rule = "none"
    epochs: int = 0

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Read a stage from text such as "161:600", "161:3e" or "161:600:riflex"."""
        parts = [part.strip() for part in str(text).split(":")]
        form = re.fullmatch(r"(\d+):(\d+)(e?)", ":".join(parts[:2]), re.ASCII)
        if len(parts) not in (2, 3) or form is None:
            raise ValueError(
                "a stage is written frames:steps or frames:steps:rule, in quotes in YAML, as "
                f'"161:600:riflex", or with epochs as "161:3e", got {shown(text)}'
            )
        given = parts[2] if len(parts) == 3 else "none"
        known: dict[str, Rule] = {one: one for one in RULES}
        rule = known.get(given)
        if rule is None:
            raise ValueError(f"the rule of a stage must be one of {RULES}, got {shown(given)}")
        frames, count = int(form[1]), int(form[2])
        if not frames or not count:
            raise ValueError(f"a stage needs at least one frame and one step, got {shown(text)}")
        return cls(frames, 0, rule, count) if form[3] else cls(frames, count, rule)

    def __str__(self) -> str:
        rule = "" if self.rope == "none" else f":{self.rope}"
        count = f"{self.epochs}e" if self.epochs else str(self.steps)
        return f"{self.frames}:{count}{rule}"


class TrainConfig(Config):
    """All fields of a finetuning. A resumed run may change those that are not `kept`."""

    VERB: ClassVar[str] = "train"

    model: str = option(
        "demo",
        "What",
        "Folder or hub repository of the pipeline; demo: the embedded model.",
        reads=model_files,
    )
    data: str | None = option(
        None,
        "What",
        "Videos with captions: a folder, a manifest, or a datasets folder. Of student_steps also "
        "prompts alone: a .txt with one a line.",
        kept=False,
        reads=Path,
    )
    datasets: tuple[str | dict, ...] = option(
        (),
        "What",
        "Several data sets in the place of data: a folder each, or {data: FOLDER, repeats: 2} "
        "with settings of its own.",
        kept=False,
        metavar="FOLDER|{...}",
    )
    cache: str | None = option(
        None, "What", "Folder of cached latents; none: OUT/cache.", kept=False
    )
    out: str = option(
        "outputs/lora",
        "What",
        "Folder for the adapter, checkpoints, logs and sampled videos.",
        kept=False,
    )
    adapter: Literal["lora", "image_prompt"] = option(
        "lora",
        "What",
        "Kind of adapter: a LoRA, or an image prompt, by which the frozen model follows an image.",
    )
    part: Literal["transformer", "transformer_2", "both"] = option(
        "transformer",
        "What",
        "Transformer to train, of a model with two: transformer is for high noise, transformer_2 "
        "for low; both: one run after the other.",
    )
    condition: Condition | None = option(
        None,
        "What",
        "Condition of a clip: its caption, also its first frame, also its first and its last "
        "frame, or also a control film beside it; none: as the model's pipeline makes videos.",
    )
    first_frame_dropout: float = option(
        0.0,
        "What",
        "Share of clips shown without their first frame, for models that also make videos from "
        "text alone.",
        ge=0,
        le=1,
    )
    last_frame_dropout: float = option(
        0.0,
        "What",
        "Share of clips shown without their last frame, for models that also make videos from a "
        "first frame alone.",
        ge=0,
        le=1,
    )

    height: int = option(
        480,
        "Clips",
        "Height in pixels, after resizing and a crop to the middle; of demo 96 by default.",
        ge=1,
        le=MOST_PIXELS,
    )
    width: int = option(
        832,
        "Clips",
        "Width in pixels, after resizing and a crop to the middle; of demo 96 by default.",
        ge=1,
        le=MOST_PIXELS,
    )
    sizes: tuple[str, ...] = option(
        (),
        "Clips",
        "Several sizes as HEIGHTxWIDTH; a clip takes the nearest shape. Height and width are then "
        "the size of sampled videos, by default the first.",
        commas=True,
    )
    fps: float | None = option(
        16.0,
        "Clips",
        "Frames a second that clips are resampled to; none: their own.",
        ge=0.01,
        le=1000.0,
    )
    on_broken: Literal["skip", "stop"] = option(
        "skip", "Clips", "Action for a file that cannot be read.", kept=False
    )
    workers: int = option(
        2,
        "Clips",
        "Number of threads that read clips ahead of the encoder; 0: none.",
        ge=0,
        le=MOST_WORKERS,
        kept=False,
    )
    take: Literal["start", "middle", "all"] = option(
        "start",
        "Clips",
        "Piece of a clip longer than a stage; all: chunks one after the other.",
    )
    scenes: Literal["off", "cut"] = option(
        "off", "Clips", "Scene detection; cut: no chunk crosses a cut. Needs gen_accel[scenes]."
    )
    sound: bool = option(
        False,
        "Clips",
        "Training of the clips' sound beside the video, of LTX-2; clips without sound train their "
        "video alone.",
    )
    images: float = option(
        0.0, "Clips", "Share of steps that show pictures, as clips of 1 frame.", ge=0, lt=1
    )
    held_out: float = option(
        0.0,
        "Clips",
        "Number of clips kept from training, whose loss shows what is learnt; below 1: their "
        "share.",
        ge=0,
    )
    repeats: tuple[str, ...] = option(
        (), "Clips", "Repetitions of some clips, PATTERN=NUMBER each, such as people/*=3."
    )

    trigger: str | None = option(
        None, "Captions", "Word put before every caption that does not hold it."
    )
    prefix: str | None = option(None, "Captions", "Text put before every caption.")
    default_caption: str | None = option(
        None, "Captions", "Caption of clips that have none; none: such clips are refused."
    )
    shuffle_tags: int | None = option(
        None,
        "Captions",
        "Number of leading tags that keep their place, while the others change order; none: all.",
        ge=0,
    )
    tag_orders: int = option(
        4,
        "Captions",
        "Number of tag orders per caption with shuffle_tags, one a step.",
        ge=1,
        le=1000,
    )
    max_tokens: int | None = option(
        None, "Captions", "Maximum caption length in tokens; none: the pipeline's own.", ge=1
    )

    stages: tuple[str, ...] = option(
        ("81:200", "161:600"),
        "Length",
        "Length curriculum, frames:steps[:rule] each, or epochs as 81:3e; of demo 33:200 by "
        "default. Rules: riflex, position_interpolation.",
        commas=True,
    )
    trained_frames: int | None = option(
        None,
        "Length",
        "Number of frames that the model was trained on; none: as known of the model.",
        ge=1,
    )

    method: str = option(
        "piecewise",
        "Attention",
        "Attention method, one of `gen-accel list` or module:Class; dense: the model's own.",
        choices=registry.METHODS,
        form="Rule by which pairs of tokens are left out; dense: none.",
    )
    settings: tuple[str, ...] = option(
        (), "Attention", "Options of the attention method, field=value each."
    )
    kernel: str = option(
        "auto",
        "Attention",
        "Kernel of the attention; a named one never falls back.",
        choices=("auto", *registry.KERNELS),
        kept=False,
    )
    dense_layers: int = option(
        registry.RULES[registry.PRESET].layers,
        "Attention",
        "Number of first blocks that stay dense.",
        ge=0,
        le=MOST_LAYERS,
    )
    dense_steps: int = option(
        0,
        "Attention",
        "Number of first denoising steps that stay dense in a generation; kept beside the LoRA.",
        ge=0,
    )

    rank: int = option(
        128, "LoRA", "Rank of the LoRA; 0 trains the parameters of the method alone.", ge=0
    )
    alpha: float | None = option(
        None, "LoRA", "Numerator of the LoRA's weight, alpha / rank; none: the rank.", gt=0
    )
    targets: tuple[str, ...] = option(
        ("attention",),
        "LoRA",
        "Layers with a LoRA: attention, feed_forward, or ends of names of linear layers.",
        commas=True,
    )
    lora_dropout: float = option(
        0.0, "LoRA", "Share of the LoRA's inputs that is dropped.", ge=0, lt=1
    )
    lora_kind: registry.LoraKind = option(
        "lora",
        "LoRA",
        "Form of a weight's change: two matrices; loha: two such by element; lokr: a Kronecker "
        "product, of few numbers.",
    )
    lora_plus: float | None = option(
        None,
        "LoRA",
        "Learning rate of the second matrix over the first's, LoRA+, as 16; none: one rate.",
        ge=1,
        le=10_000,
    )
    dora: bool = option(
        False, "LoRA", "DoRA: lengths of the weights' rows train apart from their directions."
    )
    rank_stabilised: bool = option(
        False, "LoRA", "Weight alpha / sqrt(rank), with which high ranks train as fast as low."
    )
    train_processors: bool = option(
        True, "LoRA", "Training of the method's own parameters, as of sparse_linear."
    )
    init_lora: str | None = option(
        None,
        "LoRA",
        "Folder of a LoRA to start from, with a new optimizer; of this rank or lower, on these "
        "targets or fewer.",
        reads=Path,
    )

    image_encoder: str | None = option(
        None,
        "Image prompt",
        "Folder or hub repository of a CLIP vision model; none: a small encoder trains along.",
        reads=Path,
    )
    image_features: Literal["embedding", "patches"] = option(
        "patches",
        "Image prompt",
        "Output of image_encoder to read, as in IP-Adapter or IP-Adapter Plus.",
    )
    image_tokens: int = option(4, "Image prompt", "Number of tokens per image.", ge=1)
    image_size: int = option(
        32, "Image prompt", "Side in pixels of the image that the small encoder sees.", ge=1
    )
    image_dropout: float = option(
        0.05, "Image prompt", "Share of clips shown without their image.", ge=0, le=1
    )
    init_adapter: str | None = option(
        None,
        "Image prompt",
        "Image-prompt adapter to start from, with a new optimizer.",
        reads=adapter_named,
    )

    objective: Literal["flow", "distill", "distill_attention", "causal"] = option(
        "flow",
        "Loss",
        "Target of the prediction; flow: the model's own; distill: the dense model's prediction, "
        "for an image prompt from the clip's teacher_caption; distill_attention: the output of "
        "each attention to that caption; causal: the model's own, chunk after chunk, for videos "
        "without end.",
    )
    teacher_guidance: float = option(
        1.0,
        "Loss",
        "Guidance scale of the teacher of objective distill; above 1 the LoRA holds the guidance, "
        "and generates without, in half the time.",
        ge=1,
    )
    teacher_lora: str | None = option(
        None,
        "Loss",
        "Folder of the teacher's LoRA, run with its own attention; none: the model as it came.",
        kept=False,
        reads=Path,
    )
    teacher_method: str | None = option(
        None,
        "Loss",
        "Attention method of the teacher of objective distill; none: its LoRA's own, or dense.",
        choices=registry.METHODS,
    )
    teacher_settings: tuple[str, ...] = option(
        (), "Loss", "Options of the teacher's attention method, field=value each."
    )
    student_steps: int | None = option(
        None,
        "Loss",
        "Number of denoising steps that the LoRA learns to make a video in, each as its teacher "
        "takes it in several; none: no steps, each noise level by itself.",
        ge=1,
        le=64,
    )
    teacher_steps: int | None = option(
        None,
        "Loss",
        "Number of the teacher's denoising steps, a multiple of student_steps; none: three for "
        "each of the student's.",
        ge=1,
        le=1000,
    )
    starts: Literal["own", "teacher", "data"] = option(
        "own",
        "Loss",
        "Latents that a step of the student begins with; own: as its own steps make them of "
        "noise; teacher: as the teacher's do; data: a clip with noise.",
    )
    student_sampler: Literal["euler", "lcm"] = option(
        "euler", "Loss", "Sampler of the student's steps; lcm: with fresh noise in each."
    )
    timestep_sampling: Literal["logit_normal", "uniform"] = option(
        "logit_normal", "Loss", "Distribution of noise levels, before the shift."
    )
    logit_mean: float = option(0.0, "Loss", "Mean of the logit_normal distribution.")
    logit_std: float = option(
        1.0, "Loss", "Standard deviation of the logit_normal distribution.", gt=0
    )
    shift: float | None = option(
        None, "Loss", "Shift of the noise levels; none: the scheduler's.", gt=0
    )
    sampled_steps: int | None = option(
        None,
        "Loss",
        "Number of denoising steps of a step-distilled model, whose noise levels alone train; "
        "none: all levels.",
        ge=1,
        le=1000,
    )
    noise_levels: tuple[float, ...] = option(
        (), "Loss", "Noise levels that train alone, above 0 and at most 1, as 1.0,0.757,0.522."
    )
    huber: float | None = option(
        None,
        "Loss",
        "Width of the pseudo-Huber loss, above which an error counts by its size, not its square; "
        "none: mean squared error.",
        gt=0,
    )
    weighting: Literal["none", "cosmap", "min_snr"] = option(
        "none",
        "Loss",
        "Weights of noise levels: cosmap for flow matching (SD3), min_snr for v-prediction "
        "(CogVideoX).",
    )
    min_snr: float = option(
        5.0, "Loss", "Cut of the signal-to-noise ratio with weighting min_snr.", gt=0
    )
    caption_dropout: float = option(
        0.1, "Loss", "Share of clips shown without their caption.", ge=0, le=1
    )
    masks: bool = option(
        False,
        "Loss",
        "Loss weights from clip.mask.mp4 or .png beside clip.mp4, or the column mask: white "
        "counts fully, black as mask_floor.",
    )
    mask_floor: float = option(0.0, "Loss", "Loss weight of black mask pixels.", ge=0, le=1)

    chunk_frames: int = option(
        Zones.frames,
        "Chunks",
        "Number of latent frames in a chunk of objective causal.",
        ge=1,
        le=1000,
    )
    window: int = option(
        Zones.window,
        "Chunks",
        "Number of newest chunks that a chunk sees whole; training shows 1 to this many.",
        ge=1,
        le=1000,
    )
    sink: int = option(
        Zones.sink, "Chunks", "Number of first chunks that are always seen.", ge=0, le=1000
    )
    middle: Middle = option(
        Zones.middle,
        "Chunks",
        "Tokens that are seen of chunks older than the window; salient: one in sixteen and a mean "
        "of the others; grid: means of cells; all: each. Training shows all kinds but this last.",
    )
    remembered: int = option(
        Zones.remembered, "Chunks", "Number of older chunks that the middle holds.", ge=1, le=1000
    )
    context_noise: float = option(
        0.3,
        "Chunks",
        "Most noise of the chunks that are seen in training; a third of it in a generation.",
        ge=0,
        lt=1,
    )

    batch_size: int = option(1, "Optimizer", "Number of clips per process and micro-step.", ge=1)
    gradient_accumulation: int = option(
        1, "Optimizer", "Number of micro-steps per optimizer step.", ge=1
    )
    optimizer: str = option(
        "adamw",
        "Optimizer",
        "Optimizer: adamw, adamw8bit, or module.Class, such as prodigyopt.Prodigy.",
    )
    optimizer_settings: tuple[str, ...] = option(
        (), "Optimizer", "Further arguments of the optimizer, field=value each, as d_coef=0.5."
    )
    learning_rate: float = option(
        1e-4, "Optimizer", "Learning rate after the warm-up.", gt=0, le=MOST_RATE
    )
    betas: tuple[float, float] = option(
        (0.9, 0.99), "Optimizer", "Betas of AdamW; passed to other optimizers only when set."
    )
    weight_decay: float = option(
        0.0, "Optimizer", "Weight decay of AdamW; passed to other optimizers only when set.", ge=0
    )
    schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "Optimizer", "Course of the learning rate after the warm-up."
    )
    warmup_steps: int = option(
        20, "Optimizer", "Number of steps over which the learning rate rises.", ge=0
    )
    max_grad_norm: float = option(
        1.0, "Optimizer", "Limit of the gradient norm; 0 disables clipping.", ge=0
    )
    ema_decay: float = option(
        0.0,
        "Optimizer",
        "Decay of the moving average that is saved as the result, as 0.99; 0: no average.",
        ge=0,
        lt=1,
    )

    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "bf16",
        "Machine",
        "Floating-point type of the computation; no: float32, which is demo's by default.",
    )
    device: str = option(
        "auto",
        "Machine",
        "Device: auto or cpu; `accelerate launch` decides the rest.",
        choices=("auto", *registry.DEVICES[:3]),
        kept=False,
    )
    seed: int = option(0, "Machine", "Seed of all random draws.", ge=0, le=SEEDS - 1)
    context_parallel: int = option(
        1,
        "Machine",
        "Number of processes that share a clip, each with some of its tokens.",
        ge=1,
        kept=False,
    )

    base: Literal["bf16", "fp8", "int8", "nf4"] | None = option(
        None,
        "Memory",
        "Storage type of the model's frozen weights; none: mixed_precision.",
        form="Storage type of the model's frozen weights; none: as it computes.",
    )
    blocks_to_swap: int = option(
        0,
        "Memory",
        "Number of blocks that wait in CPU memory until their turn; needs checkpointing.",
        ge=0,
        kept=False,
    )
    gradient_checkpointing: Literal["off", "on", "offload"] = option(
        "off",
        "Memory",
        "Gradient checkpointing: less memory for about a third more time; offload: kept inputs go "
        "to CPU memory.",
        bare="on",
        kept=False,
    )
    checkpoint_parts: bool = option(
        False,
        "Memory",
        "Checkpointing within a block as well, of attentions and feed-forward: about a quarter "
        "more time.",
        kept=False,
    )

    every: Literal["steps", "epochs"] = option(
        "steps",
        "Keeping",
        "Unit of checkpoint_every, loss_every and validate_every; an epoch shows each clip of its "
        "stage once.",
        kept=False,
    )
    checkpoint_every: int = option(
        100, "Keeping", "Number of steps between two checkpoints.", ge=1, kept=False
    )
    keep_checkpoints: int = option(
        2, "Keeping", "Number of newest checkpoints to keep.", ge=1, kept=False
    )
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = option(
        "tensorboard", "Keeping", "Tracker of the curves, beside OUT/metrics.jsonl.", kept=False
    )
    loss_every: int = option(
        0,
        "Keeping",
        "Number of steps between two losses at fixed noise, of the clips held out or else of 8 "
        "that train; 0: none.",
        ge=0,
        kept=False,
    )
    validate_every: int = option(
        0, "Keeping", "Number of steps between two samplings of videos; 0: none.", ge=0, kept=False
    )
    validation_prompts: tuple[str, ...] = option(
        (),
        "Keeping",
        "Prompts of the sampled videos, one video each, with seeds from 0.",
        kept=False,
        longest=registry.MOST_PROMPT,
    )
    validation_images: tuple[str, ...] = option(
        (),
        "Keeping",
        "Image files, one per validation prompt: image prompts, or first frames; none: taken from "
        "the first clips.",
        kept=False,
        reads=Path,
    )
    validation_last_images: tuple[str, ...] = option(
        (),
        "Keeping",
        "Image files, one per validation image: last frames, for condition last_frame.",
        kept=False,
        reads=Path,
    )
    validation_controls: tuple[str, ...] = option(
        (),
        "Keeping",
        "Films, one per validation prompt: control videos, for condition control.",
        kept=False,
        reads=Path,
    )
    validation_frames: int | None = option(
        None,
        "Keeping",
        "Number of frames of sampled videos; none: of the longest stage.",
        ge=1,
        kept=False,
    )
    validation_steps: int = option(
        20,
        "Keeping",
        "Number of denoising steps of sampled videos; with student_steps as many.",
        ge=1,
        le=10_000,
        kept=False,
    )
    sample_with: tuple[str, ...] = option(
        (),
        "Keeping",
        "Techniques of `gen_accel.extend` for sampled videos longer than trained_frames, and for "
        "each generation that takes this LoRA by --from-lora.",
        kept=False,
        form="Techniques for sampled videos longer than trained_frames, and for each generation "
        "that takes this LoRA with its attention.",
    )
    guidance_scale: float | None = option(
        None,
        "Keeping",
        "Guidance scale of sampled videos; none: 5, or 1 if the LoRA holds the guidance or learns "
        "student_steps.",
        kept=False,
    )

    def _take(self, given: Mapping[Any, Any], origin: str = "", typed: Any = ()) -> None:
        for name in given:
            if name in GONE:
                raise ValueError(f"{name} is gone: {GONE[name]}")
        super()._take(given, origin, typed)
        held = vars(self)  # some fields follow from others
        for name in ("out", "cache"):
            if held[name] is not None:
                held[name] = str(expanded(held[name]))
        has_sizes = self.sizes or (self.sets and all(one.sizes for one in self.sets))
        if has_sizes and not (self.is_given("height") or self.is_given("width")):
            held["height"], held["width"] = self.clip_sizes[0]
        if self.model == DEMO:
            followed = {*given, *(("height", "width") if has_sizes else ())}
            held.update({name: one for name, one in OF_DEMO.items() if name not in followed})
        if self.student_steps is not None and not self.is_given("validation_steps"):
            held["validation_steps"] = self.student_steps
        for fault in _faults(self):
            raise ValueError(fault)

    def runs(self) -> list["TrainConfig"]:
        """Return the configs of the runs of this training: one, or one for each expert."""
        if self.part != BOTH:
            return [self]
        return [
            self.replaced(
                part=part,
                out=str(Path(self.out) / folder),
                cache=str(self.cache_folder),
                init_lora=folder_of(self.init_lora, part),
                teacher_lora=folder_of(self.teacher_lora, part),
            )
            for part, folder in NOISE.items()
        ]

    def check(self, *, published: bool = False, fetch: bool = False) -> None:
        """Refuse unknown names, packages that are not installed, and a model that is not there.

        Args:
            published: whether the name of a published model is enough, as for a plan.
            fetch: whether the hub is asked for the experts of a model there.
        """
        registry.check_method(self.method)
        registry.check_kernel(self.kernel)
        registry.check_device(self.device)
        registry.check_techniques(self.sample_with, "sample_with")
        self._check_packages()
        if any(one.scenes == "cut" for one in (self, *self.sets)):
            from gen_accel.lora.data.survey import check_scenes

            check_scenes()
        (check_subject if published else check_pipeline)(self.model)
        loras = {"init_lora": self.init_lora, "teacher_lora": self.teacher_lora}
        check_parts(self.part, self.model, loras, fetch=fetch)

    def _check_packages(self) -> None:
        for name in ("base", "optimizer"):
            value = getattr(self, name)
            package = PACKAGES.get(value)
            if package is not None and find_spec(package) is None:
                raise ValueError(registry.needs(f"{name} {value}", package, "quantized"))
        if self.tracker != self.log_with and self.log_with not in ("none", "tensorboard"):
            raise ValueError(
                f"log_with {self.log_with} needs {self.log_with}: pip install {self.log_with}"
            )
        if self.optimizer in OPTIMIZERS:
            return
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", self.optimizer):
            raise ValueError(
                f"optimizer must be adamw, adamw8bit or module.Class, such as prodigyopt.Prodigy, "
                f"got {shown(self.optimizer)}"
            )
        package = self.optimizer.partition(".")[0]
        if find_spec(package) is None:
            raise ValueError(f"optimizer {self.optimizer} needs {package}: pip install {package}")

    def check_files(self) -> None:
        """Refuse files and folders that are not there, or cannot be made, and clips without
        captions that can be read."""
        names = ("validation_images", "validation_last_images", "validation_controls")
        shown_files = {name: getattr(self, name) for name in names}
        for file in chain((one.data for one in self.sets), *shown_files.values()):
            check_input(file)
        for one in self.sets:
            if not expanded(one.data).exists():
                raise FileNotFoundError(f"data: there is nothing at {one.data}")
        for name in ("out", "cache"):
            check_folder_path(name, getattr(self, name))
        for name in ("init_lora", "teacher_lora"):
            check_files(f"LoRA for {name}", getattr(self, name))
        check_sources("adapter for init_adapter", self.init_adapter)
        check_sources("image encoder", self.image_encoder)
        for name, files in shown_files.items():
            for file in files:
                if not expanded(file).is_file():
                    raise FileNotFoundError(f"{name}: there is no file at {file}")
        self.clips()  # before torch is imported, which takes seconds

    def inputs(self) -> dict[str, list[Path]]:
        return super().inputs() | {"datasets": [Path(one.data) for one in self.sets]}

    def outputs(self) -> dict[str, list[Path]]:
        runs = [self, *self.runs()]
        return {"out": [*dict.fromkeys(Path(one.out) / one.adapter for one in runs)]}

    def new_outputs(self) -> dict[str, list[Path]]:
        return {}  # --resume goes on with them, and `trainer.check_out` refuses all others

    @property
    def checkpoints_activations(self) -> bool:
        return self.gradient_checkpointing != "off"

    @property
    def is_quantised(self) -> bool:
        """Whether a library holds the base's weights in a form of its own."""
        return self.base in registry.QUANTISERS

    @property
    def casts_base(self) -> bool:
        """Whether the base is held in another floating-point dtype than it computes in."""
        return self.base == "fp8" or (self.base == "bf16" and self.mixed_precision != "bf16")

    @property
    def needs_clips(self) -> bool:
        """Whether clips train; else prompts alone are enough."""
        return self.student_steps is None or self.starts == "data"

    @property
    def why_clips(self) -> str | None:
        """Reason why clips are needed; None where prompts alone are enough."""
        asked = {name: getattr(self, name) for name in ("condition", "sound", "images")}
        return why_clips(self.needs_clips, **asked)

    @property
    def cache_folder(self) -> Path:
        return Path(self.out) / "cache" if self.cache is None else Path(self.cache)

    @property
    def tracker(self) -> str | None:
        """Tracker of the curves; None for one that is not installed."""
        return self.log_with if self.log_with != "none" and find_spec(self.log_with) else None

    @property
    def precision(self) -> Literal["float32", "bfloat16", "float16"]:
        """Dtype of the computation."""
        return PRECISIONS[self.mixed_precision]

    @property
    def lora_alpha(self) -> float:
        """Numerator of the LoRA's weight."""
        return self.rank if self.alpha is None else self.alpha

    @property
    def sets(self) -> tuple[Dataset, ...]:
        """The data sets: `data` alone, or each of `datasets`."""
        if self.data is not None:
            return (Dataset(data=self.data),)
        return tuple(
            Dataset.parse(told, f"datasets, item {number}")
            for number, told in enumerate(self.datasets, 1)
        )

    @property
    def zones(self) -> Zones:
        """Zones of earlier chunks that a chunk sees, with objective causal."""
        return Zones(self.chunk_frames, self.window, self.sink, self.middle, self.remembered)

    def clips(self) -> list[CaptionedVideo]:
        """Find the clips of all data sets, as `find_videos` does; none without a data set."""
        from gen_accel.lora.data.finding import find_videos

        if not self.sets:
            return []
        return find_videos(
            self.sets,
            rule=self.rule,
            needed=self.why_clips,
            images=self.adapter == "image_prompt",
            pictures="all" if 1 in self.clip_lengths else "captioned",
            default_caption=self.default_caption,
            masks=self.masks,
            controls=self.condition == "control",
            teacher=self.reads_teacher_captions,
            repeats=self.repeats,
            changing=self.objective == CAUSAL,
        )

    @property
    def rule(self) -> ClipRule:
        """How clips are cut and captioned whose data set does not say otherwise."""
        return ClipRule(
            Take(self.take, self.scenes),
            Captions(self.trigger, self.prefix, self.shuffle_tags, self.tag_orders),
            parse_sizes(",".join(self.sizes)) if self.sizes else ((self.height, self.width),),
            sorted({stage.frames for stage in self.curriculum}),
        )

    @property
    def clip_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels that clips are cut to."""
        rules = [one.rule(self.rule) for one in self.sets] or [self.rule]
        return tuple(dict.fromkeys(size for rule in rules for size in rule.sizes))

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

    def in_steps(self, epochs: Sequence[int]) -> "TrainConfig":
        """Return the config with all stages in steps.

        Args:
            epochs: steps of an epoch of each stage.
        """
        stages = zip(self.curriculum, epochs, strict=True)
        counted = (replace(s, steps=s.steps or s.epochs * n, epochs=0) for s, n in stages)
        return self.replaced(stages=tuple(map(str, counted)))

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
# Of teacher_lora it is the path; its weights are compared by their hash.
FREE_TO_CHANGE = tuple(name for name, one in TrainConfig.options().items() if not one.kept)


def read_config(
    path: str | Path | None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Read a config from a YAML file; `overrides` take precedence over it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping, a field is unknown (the error names the nearest),
            a value has the wrong type or is out of its limits, or fields do not go together.
    """
    if path is None:
        return TrainConfig.read({}, overrides)
    return TrainConfig.from_yaml(path, overrides)


def print_config(config: TrainConfig | None = None) -> str:
    """Return a YAML file of all fields, each with its help as a comment."""
    return (config or TrainConfig()).as_yaml()


def differences(
    config: TrainConfig, earlier: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Find changed fields that the training depends on: name to (earlier, now)."""
    found = {}
    for name, one in TrainConfig.options().items():
        if name in FREE_TO_CHANGE:
            continue
        now = getattr(config, name)
        before = earlier.get(name, one.default)
        before = tuple(before) if isinstance(before, list) else before
        if now != before:
            found[name] = (before, now)
    return found


def packages_of(given: Mapping[str, str | None]) -> set[str]:
    """Packages that hold the base or step the optimizer.

    Args:
        given: fields of a config, by name.
    """
    words = (given.get(name) or "" for name in ("base", "optimizer"))
    return {PACKAGES.get(word, word.partition(".")[0]) for word in words if word}


def _faults(config: TrainConfig) -> Iterator[str]:
    """Say which fields do not go together, and what single values cannot be."""
    if not config.stages:
        yield "stages is empty: give at least one, as 81:200"
    assert config.curriculum  # refuses what is no stage
    own, sizes = config.rule.sizes, config.clip_sizes
    if len({*own}) < len(own):
        yield f"sizes must differ, got {', '.join(config.sizes)}"
    height, width = config.height, config.width
    if (height, width) not in sizes:
        yield (
            f"height {height} and width {width}, of the videos sampled, are none of sizes "
            f"{', '.join(f'{rows}x{columns}' for rows, columns in sizes)}: leave both out, or add "
            f"{height}x{width} to sizes"
        )
    for text in config.repeats:
        parse_repeats(text)
    if config.sound and config.fps is None:
        yield "sound needs fps, so that clip and sound last equally long: give fps, as 24"
    held = config.held_out
    if held >= 1 and held % 1:
        yield (
            f"held_out must be a whole number of clips, or a share from 0 to below 1, got {held:g}"
        )
    for name in ("trigger", "default_caption"):
        text = getattr(config, name)
        if text is not None and not text.strip():
            yield f"{name} must hold a word, got {shown(text)}: leave it out for none"
    for names, goes, why in _rules(config):
        for name in () if goes else filter(config.is_given, names):
            value = getattr(config, name)
            words = value if isinstance(value, str) else shown(value)
            words = f"{value:g}" if isinstance(value, float) else words
            yield f"{name} {why}" if value is True else f"{name} {words} {why}"
    if config.adapter == "lora" and config.rank and not config.targets:
        yield "targets is empty: name what the LoRA is put on, as attention"
    if config.objective == CAUSAL:
        assert config.zones  # refuses what does not go together
        from gen_accel.pipelines.generation.config import parts_of

        frames = config.validation_frames or config.longest
        for prompt in config.validation_prompts:
            if (late := max(parts_of(prompt))) >= frames:
                yield f"a validation prompt holds from frame {late}, and its video has {frames}"
        for stage in config.curriculum:
            if stage.rope != "none":
                yield (
                    "positions begin again in each chunk of objective causal, got stage "
                    f"{stage}: leave {stage.rope} out"
                )
    if not all(0 < level <= 1 for level in config.noise_levels):
        yield f"noise_levels must be above 0 and at most 1, got {shown(config.noise_levels)}"
    if not all(0 <= beta < 1 for beta in config.betas):
        yield f"betas must be two shares from 0 to below 1, got {shown(config.betas)}"
    for name, other, needed in (
        ("validation_images", "validation_prompts", False),
        ("validation_controls", "validation_prompts", config.condition == "control"),
        ("validation_last_images", "validation_images", False),
    ):
        have, wanted = len(getattr(config, name)), len(getattr(config, other))
        if have != wanted and (have or (needed and config.validate_every)):
            yield f"{name} must be as many as {other}, {wanted}, got {have}"


def _rules(c: TrainConfig) -> Iterator[tuple[Sequence[str], bool, str]]:
    """Yield fields, whether they may be given, and else what is said after name and value."""
    adapter, steps, causal = c.adapter, c.student_steps, c.objective == CAUSAL
    is_lora, alone = adapter == "lora", c.objective == "distill_attention"
    groups: dict[str, list[str]] = {}
    for name, one in c.options().items():
        groups.setdefault(one.group, []).append(name)
    not_lora = f"is for adapter lora, got {adapter}: leave it out"

    # Clips and captions
    yield ["datasets"], c.data is None, f"and data {c.data} both name the clips: give one of them"
    learnt = ["student_steps", "teacher_guidance"]
    yield learnt, not c.sound, "does not go with sound: leave one of them out"
    yield ["images"], not c.sound, "does not go with sound, of films: leave one of them out"
    yield (
        ["held_out"],
        c.loss_every > 0,
        "keeps clips from training to measure their loss: give loss_every, as 50",
    )
    yield (
        ["tag_orders"],
        c.shuffle_tags is not None,
        "is for shuffle_tags, which is not given: give shuffle_tags, as 1, or leave it out",
    )
    yield (
        ["condition"],
        is_lora or c.condition == "text",
        f"is for adapter lora, got adapter {adapter}: an image prompt is trained on models from "
        "text to video",
    )
    for name, fit in DROPOUTS.items():
        why = f"is for condition {fit[0]}, got condition {c.condition}: leave it out"
        yield [name], c.condition in (None, *fit), why
    yield ["sound", *DROPOUTS], is_lora, not_lora

    # Adapter
    other = "Image prompt" if is_lora else "LoRA"
    why = f"is not used by adapter {adapter}: leave out what belongs to a {other}"
    yield groups[other], False, f"{why} ({', '.join(groups[other])})"
    of_lora = ["dora", "rank_stabilised", "lora_plus"]
    why = "and rank is 0: give a rank, or leave it out"
    yield [*of_lora, "lora_kind"], c.rank > 0, f"is of a LoRA, {why}"
    yield ["teacher_lora"], c.rank > 0, f"teaches a LoRA, {why}"
    why = f"is of lora_kind lora, got {c.lora_kind}: leave it out"
    yield [*of_lora, "lora_dropout"], c.lora_kind == "lora", why
    why = f"does not go onto base {c.base}: take base fp8, or lora_kind lora"
    yield ["lora_kind"], not c.is_quantised, why
    yield (
        ["teacher_guidance", "teacher_lora", "teacher_method", "student_steps"],
        is_lora and c.objective in ("distill", CAUSAL),
        f"is for objective distill of adapter lora, got {c.objective} of {adapter}: leave it out",
    )
    yield ["objective"], not (alone and is_lora), "is for adapter image_prompt: take distill"
    yield (
        ["part"],
        is_lora or c.part != BOTH,
        f"trains a LoRA for each expert, got adapter {adapter}: give part transformer or "
        "transformer_2",
    )
    why = "is for adapter lora: an image prompt trains with whole clips, so leave it out"
    yield ["context_parallel"], is_lora, why
    why = "an image_encoder: leave it out"
    yield ["image_size"], c.image_encoder is None, f"does not apply to {why}"
    yield ["image_features"], c.image_encoder is not None, f"does not apply without {why}"
    yield (
        ["base"],
        is_lora or not c.is_quantised,
        "does not go with adapter image_prompt, whose layers start as copies of the model's own: "
        "take fp8",
    )

    # Steps of a student
    why = "is of a teacher_method, and none is given: give it too"
    yield ["teacher_settings"], c.teacher_method is not None, why
    why = "is for student_steps, which is not given: give student_steps, as 4, or leave it out"
    yield ["teacher_steps", "starts", "student_sampler"], steps is not None, why
    levels, drawing = len({*c.noise_levels}), ["timestep_sampling", "logit_mean", "logit_std"]
    if steps is not None:
        why = f"must be a multiple of student_steps {steps}, as {3 * steps}"
        yield ["teacher_steps"], (c.teacher_steps or steps) % steps == 0, why
        why = f"are the noise at which each of student_steps {steps} begins: give as many"
        yield ["noise_levels"], levels == steps, f"{why}, or leave them out"
        why = f"are of clips, and starts {c.starts} begins with none: leave them out"
        yield ["masks"], c.starts == "data", f"{why}, or give starts data"
        why = "says which noise levels train and by how much, which student_steps does"
        yield [*drawing, "sampled_steps", "weighting"], False, f"{why}: leave it out"

    # Chunks
    why = f"is for objective causal, got {c.objective}: leave it out"
    yield groups["Chunks"], causal, why
    if causal:
        why = (
            "with objective causal is of a teacher that makes chunks: give teacher_lora, the LoRA"
        )
        why = f"{why} of a causal training without it"
        yield ["teacher_guidance"], c.teacher_lora is not None, why
        why = "with objective causal teaches its guidance: give teacher_guidance, as 3"
        yield ["teacher_lora"], c.teacher_guidance > 1, why
        why = "is of a middle, and middle is none: give middle, as salient, or leave it out"
        yield ["remembered"], c.middle != "none", why
        why = "does not go with objective causal, which trains chunks of films by their captions"
        unfit = ["adapter", "sound", "images", "student_steps", "context_parallel", "part"]
        unfit += ["sample_with", *([] if c.condition == "text" else ["condition"])]
        yield unfit, False, f"{why}: leave it out"

    # Loss, memory and validation
    why = f"and sampled_steps {c.sampled_steps} both say where to train: give one of them"
    yield ["noise_levels"], c.sampled_steps is None, why
    fixing = "noise_levels" if levels else "sampled_steps"
    why = f"says how noise levels are drawn, which {fixing} fixes: leave one out"
    yield [*drawing, *(["shift"] if levels else [])], not c.is_given(fixing), why
    why = f"is for weighting min_snr, got {c.weighting}: leave it out"
    yield ["min_snr"], c.weighting == "min_snr", why
    yield ["mask_floor"], c.masks, "is for masks: give masks, or leave it out"
    why = "does not go with objective distill_attention, which has a loss of its own: leave it out"
    yield ["huber", "weighting", "masks"], not alone, why
    why = "saves nothing under objective distill_attention, whose gradients stay within each"
    yield ["gradient_checkpointing"], not alone, f"{why} attention: leave it out"
    why = "needs gradient_checkpointing on or offload"
    again = c.checkpoints_activations
    yield ["checkpoint_parts"], again, f"{why}, of whose blocks the parts are"
    why = f"{why}, which brings a block's weights back for its backward pass"
    yield ["blocks_to_swap"], again, why
    yield ["base"], again or not c.casts_base, why
    yield ["validate_every"], bool(c.validation_prompts), "needs validation_prompts, got none"
    is_film = c.condition == "control"
    why = f"are for condition control, got {c.condition}: leave them out"
    yield ["validation_controls"], is_film, why
    why = "are first frames or image prompts, got condition control: leave them out"
    yield ["validation_images"], not is_film, f"{why}, and give validation_controls"
