"""The recipe of a LoRA's training: read from its file, attached again, compared with what runs."""

import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.registry import method_of_file, with_tuples
from gen_accel.io import fields_of, parse_json, read_tensors, typed
from gen_accel.method import Method
from gen_accel.parsing import check_fields, shown
from gen_accel.paths import expanded
from gen_accel.registry import LoraKind

if TYPE_CHECKING:
    from diffusers import ModelMixin

WEIGHTS, CONFIG = "pytorch_lora_weights.safetensors", "gen_accel.json"
KEY = "gen_accel"  # of the metadata, and of PEFT's `auto_mapping`
VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Training of a LoRA or an image prompt. The metadata of its file holds the recipe, and a copy
    lies beside the file for people.

    Args:
        base_model: name or folder of the pipeline.
        transformer: its class, and the sizes in its config that a LoRA depends on.
        part: which transformer of the pipeline.
        method, options, schedule: the attention it was trained through.
        rope: the rule of the last stage, for more than `trained_frames` frames.
        frames, height, width: of the longest clips it saw, in frames and pixels.
        stages: the curriculum, frames:steps[:rule] each; `steps` are optimizer steps in all.
        data: hash of the clips and captions.
        teacher_guidance: scale of the guidance that is distilled into it; 1 is none.
        teacher: hash of the LoRA that taught it; None: none did.
        techniques: of `gen_accel.extend`, to generate with for more than `trained_frames` frames.
        parts: the parts of the pipeline that trained in the same run, each on its noise levels;
            empty if it was one. The LoRA of the second lies in the subfolder of its name.
        condition: what a video needs at least: "text"; "first_frame" where all clips' first frames
            were given; "last_frame" where their last ones were too; "control" where control films
            were; "either" where some clips had no frame.
        clips: how many clips it saw; None where an older version trained it, as in `batch`.
        batch: clips of an optimizer step, of all processes together.
        dora: the lengths of its layers' weights trained apart from their directions.
        rank_stabilised: its weight is alpha / sqrt(rank), elsewhere alpha / rank.
        lora_kind: what the change of a weight is made of, see `registry.LoraKind`.
        levels: noise levels that alone were trained, falling; empty: all were.
        sampler: of `registry.SAMPLERS`, whose steps from these levels it learnt; None: no steps.
        stream: how it makes a video chunk by chunk, see `StreamSettings`; None: it does not.
    """

    base_model: str
    transformer: dict[str, Any]
    part: str
    method: str
    options: dict[str, object]
    schedule: dict[str, object]
    rope: str
    trained_frames: int | None
    frames: int
    height: int
    width: int
    stages: tuple[str, ...]
    steps: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    objective: str
    data: str
    version: int = VERSION
    teacher_guidance: float = 1.0
    teacher: str | None = None
    techniques: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    condition: str = "text"
    clips: int | None = None
    batch: int | None = None
    dora: bool = False
    rank_stabilised: bool = False
    lora_kind: LoraKind = "lora"
    levels: tuple[float, ...] = ()
    sampler: str | None = None
    stream: dict[str, object] | None = None

    @property
    def others(self) -> tuple[str, ...]:
        """Further parts whose LoRAs lie in subfolders of this one's folder."""
        return self.parts[1:] if self.part in self.parts[:1] else ()

    @property
    def holds_guidance(self) -> bool:
        return self.teacher_guidance > 1

    def build_method(self) -> Method:
        return method_of_file(self.method, self.options)

    def build_schedule(self) -> Schedule:
        return Schedule.of_file(self.schedule)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        rule = "" if self.rope == "none" else f", {self.rope}"
        return f"{self.build_method()!r} at {self.frames} frames{rule}"


class OtherAttention(UserWarning):
    """A LoRA runs with another attention than it was trained with."""


class GuidedTwice(UserWarning):
    """A LoRA that holds its guidance runs with guidance."""


def scale_of(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """Return the weight of a LoRA: alpha / rank, or alpha / sqrt(rank) if it is rank-stabilised
    (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def read_recipe(source: str | Path) -> Recipe:
    """Read the recipe of a folder that holds a LoRA, or of its file. FileNotFoundError for no LoRA
    there; ValueError for one that was not trained here, or a recipe of another version."""
    path = expanded(source)
    path = path / WEIGHTS if path.is_dir() or not path.suffix else path
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at {path}")
    text = read_tensors(path, lambda names: ())[1].get(KEY)
    if text is None:
        raise ValueError(
            f"{path} does not say what attention it was trained with: it is from elsewhere. "
            "Give the method itself"
        )
    return parse(parse_json(text, f"the recipe in {path}"), path)


def folders_of(source: str | Path) -> dict[str, Path]:
    """Map the parts of a pipeline to the folders, or the file, that hold their LoRAs. Raises as
    `read_recipe`, and FileNotFoundError where the LoRA of the second expert is missing.

    Args:
        source: a folder that a training wrote, or the LoRA's file in it.
    """
    path, recipe = expanded(source), read_recipe(source)
    found = {recipe.part: path}
    folder = path if path.is_dir() else path.parent
    for part in recipe.others:
        found[part] = folder / part
        if not (folder / part / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{source} was trained with {part} in one run, whose LoRA is missing: copy the "
                f"folder {folder / part} too"
            )
    return found


def parse(data: object, origin: object) -> Recipe:
    """Return the recipe that a LoRA's metadata holds, as JSON. ValueError, which names the file or
    adapter that it came from, for what this version did not write."""
    try:
        held = fields_of(data, "it")
        if typed(held, "version", int, origin="it") != VERSION:
            raise ValueError(f"its version is {shown(held['version'])}, not {VERSION}")
        check_fields(held, Recipe, "it")
        typed(held["transformer"], "class", str, origin="its transformer")
        known = {one.name for one in fields(Recipe)}
        recipe = Recipe(**{k: v for k, v in with_tuples(held).items() if k in known})
        recipe.build_method()
        recipe.build_schedule()
        return recipe
    except (TypeError, ValueError) as error:
        raise ValueError(f"the recipe in {origin} cannot be read: {error}; train again") from error


def sizes(transformer: "ModelMixin") -> dict[str, object]:
    """Return the class and the config entries that decide whether a LoRA fits."""
    config = dict(transformer.config)
    kept = {k: v for k, v in sorted(config.items()) if isinstance(v, int | str | list | tuple)}
    kept = {k: v for k, v in kept.items() if not k.startswith("_") and k not in _NOT_SIZES}
    kept = json.loads(json.dumps(kept))
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return {"class": type(transformer).__name__.removeprefix("FSDP"), "sha256": digest, **kept}


_NOT_SIZES = ("rope_max_seq_len", "pos_embed_seq_len", "attn_mode")


def check_base(recipe: Recipe, transformer: "ModelMixin", what: str = "the LoRA") -> None:
    """Raise ValueError for a LoRA, called `what`, of a model of another class or size."""
    have = sizes(transformer)
    wrong = [
        f"{name} {shown(value)} (this model: {shown(have.get(name))})"
        for name, value in recipe.transformer.items()
        if name != "sha256" and have.get(name) != value
    ]
    if wrong:
        raise ValueError(
            f"{what} was trained on another model, {recipe.base_model}: {', '.join(wrong)}"
        )


def recipes_of(transformer: "ModelMixin") -> dict[str, Recipe]:
    """Map the name of each active adapter that was trained here to its recipe."""
    configs = getattr(transformer, "peft_config", None)
    if not configs or not hasattr(transformer, "active_adapters"):  # not all classes load LoRAs
        return {}
    try:
        active = transformer.active_adapters()
    except ValueError:  # all are switched off
        return {}
    found = {}
    for name, config in configs.items():
        data = (getattr(config, "auto_mapping", None) or {}).get(KEY)
        if name in active and data is not None:
            found[name] = parse(data, f"adapter {shown(name)}")
    return found


def warn_of_other_attention(
    transformer: "ModelMixin", method: Method, stacklevel: int = 2
) -> None:
    """Warn of each active adapter that was trained with another method than `method`."""
    for name, recipe in recipes_of(transformer).items():
        trained, run = recipe.build_method(), method.for_device(transformer.device)
        if trained in (method, run):
            continue
        warnings.warn(
            f"the LoRA {shown(name)} was trained with {trained} and runs with {run}; "
            "gen_accel.attach(pipe, from_lora=folder) attaches what it was trained with",
            OtherAttention,
            stacklevel=stacklevel,
        )
