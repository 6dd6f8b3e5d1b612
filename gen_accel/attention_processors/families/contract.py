"""The contract of a family's file: `Family` names every part once.

A part is a name at the top of the file, a constant in capitals or a function, such as `MODELS` or
`video_shape`; a part that has a default may be left out. Helpers begin with `_`, also those that
other families import. `load` checks a file against this list, so that a name that is misspelt, a
part of the wrong type and a missing part are errors. All code outside the families reads parts
from a `Family`, whose attributes are always there.

A new part is one line here; a new family is one file, and its name in `FAMILIES`.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from gen_accel.attention_processors.families.given import FIRST_FRAME
from gen_accel.attention_processors.families.layers import Flops, Layers
from gen_accel.video import VideoShape

__all__ = ["USES", "Family", "Part", "Preset", "family_named", "load"]

T = TypeVar("T")

REQUIRED: Any = object()


@dataclass(frozen=True)
class Preset:
    """A published model.

    Args:
        repository: on huggingface.co.
        config: entries of its transformer's config that differ from the defaults of the class.
        billions: its number of parameters, which a test compares with the config.
        kind: the class; None for the first of the family.
        spatial, temporal: pixels a side, and frames, in a latent; None where the family's are.
    """

    repository: str
    billions: float
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str | None = None
    spatial: int | None = None
    temporal: int | None = None


def _flow_scales(schedule: Mapping[str, Any], sigma: Tensor) -> tuple[Tensor, Tensor]:
    """1 - sigma and sigma."""
    return 1 - sigma, sigma


def _tiny_first_frame(family: "Family") -> Callable[..., dict[str, Tensor]]:
    """Latents of the first frame alone."""

    def make(transformer: Any, frames: int, height: int, width: int) -> dict[str, Tensor]:
        channels = family.latent_channels(transformer.config)
        return {FIRST_FRAME: torch.zeros(channels, 1, height, width)}

    return make


NUMBER = int, float
_WORDS = {
    str: "a string",
    bool: "True or False",
    int: "a whole number",
    NUMBER: "a number",
    tuple: "a tuple",
    Mapping: "a mapping",
    Callable: "a function",
    Preset: "a Preset",
}


class Part(Generic[T]):
    """One name that a family's file may hold.

    Args:
        kind: the type of its value; `Callable` for a function.
        meaning: in words.
        default: used where a file does not hold the part. Without a default, every file must.
        default_of: gives the default of a family, where it depends on other parts.
        choices: the only values, where they are few.
        each: the type of each of its values, where it is a tuple or a mapping.
    """

    name: str

    def __init__(
        self,
        kind: Any,
        meaning: str,
        *,
        default: Any = REQUIRED,
        default_of: Callable[["Family"], Any] | None = None,
        choices: tuple[str, ...] = (),
        each: type | None = None,
    ) -> None:
        self.kind, self.meaning, self.choices, self.each = kind, meaning, choices, each
        self.default, self.default_of = default, default_of

    @property
    def required(self) -> bool:
        return self.default is REQUIRED and self.default_of is None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, family: None, owner: type) -> "Part[T]": ...

    @overload
    def __get__(self, family: "Family", owner: type) -> T: ...

    def __get__(self, family: "Family | None", owner: type) -> Any:
        if family is None:
            return self
        held = vars(family.module)
        if self.name in held:
            return held[self.name]
        return self.default if self.default_of is None else self.default_of(family)

    def refusal(self, value: Any) -> str | None:
        """Return why `value` cannot be this part; None where it can."""
        if value is None:
            return None if self.default is None else f"must be {_WORDS[self.kind]}, got None"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(map(repr, self.choices))}, got {value!r}"
        if not isinstance(value, self.kind) or isinstance(value, bool) != (self.kind is bool):
            return f"must be {_WORDS[self.kind]}, got {type(value).__name__} {value!r}"
        if self.each is None:
            return None
        values = value.values() if isinstance(value, Mapping) else value
        return next(
            (
                f"must be {_WORDS[self.kind]}, each {_WORDS[self.each]}, got {one!r} among them"
                for one in values
                if not isinstance(one, self.each)
            ),
            None,
        )


class Family:
    """A family's parts, read from its module at each access, with the defaults filled in.

    Args:
        name: of its file.
        module: its file.
    """

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module = name, module

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        """Copy and pickle by name, as a module can be neither copied nor pickled."""
        return family_named, (self.name,)

    def serves(self, use: str) -> bool:
        """Whether the family has all parts that a key of `USES` needs."""
        return all(getattr(self, part) is not None for part in USES[use])

    # What it is

    MODELS = Part[str](str, "the published models that it serves, in words")
    CLASSES = Part[tuple[str, ...]](tuple, "the names of their transformer classes", each=str)
    ATTENTION_CALL = Part[str](str, "the global name of the attention call in their processors")
    ORDER = Part[str](
        str, "what the tokens of their self-attention are, in words and in their order"
    )
    KIND = Part[str](
        str,
        '"frames" is a video of which each frame attends by itself',
        choices=("video", "frames", "image"),
    )
    LORA_TARGETS = Part[Mapping[str, tuple[str, ...]]](
        Mapping, "names of a group of layers to what they end in, inside the blocks", each=tuple
    )
    FPS = Part[float](
        NUMBER,
        "frames a second that the published models were made for, where their pipelines take none",
        default=16,
    )
    fps = Part[Callable[[Any], float]](
        Callable,
        "(transformer): the same of this one, where they are not alike",
        default_of=lambda family: lambda transformer: family.FPS,
    )

    # One forward pass: each function takes its arguments

    self_attentions = Part[Callable[..., list]](
        Callable,
        "(transformer): the attentions over the tokens of video or image, as `SelfAttention`s",
    )
    video_shape = Part[Callable[..., VideoShape]](
        Callable,
        "(transformer, ...): the token grid, one frame for an image, and as its text all other "
        "tokens that attend with it",
    )
    timestep = Part[Callable[..., Tensor]](Callable, "(...): of the forward pass")
    before = Part[Callable[..., int] | None](
        Callable,
        "(transformer, ...): how many of the text's tokens come before the grid; None: none",
        default=None,
    )
    text_lengths = Part[Callable[..., tuple[int, ...] | None] | None](
        Callable,
        "(transformer, ...): tokens of each sample's text, where a mask hides its padding, and "
        "None where the padding is not at its end. Graphs of torch.compile need it",
        default=None,
    )
    TIMESTEPS_RISE = Part[bool](
        bool, "the timestep rises from step to step; elsewhere it falls", default=False
    )
    MASKS_ALIKE = Part[bool](bool, "each layer makes the same mask anew", default=False)
    MASK_OF_PAIRS = Part[bool](
        bool,
        "each layer makes a mask of all pairs of tokens, too long to be read: `text_lengths` are",
        default=False,
    )

    # Several processes

    context_parallel = Part[Callable[[Any], dict[str, Any]] | None](
        Callable,
        "(transformer): a plan by which diffusers splits it over processes, where it has none of "
        "its own; keys are modules, values say which inputs are split and outputs gathered",
        default=None,
    )
    no_context_parallel = Part[Callable[[Any], str | None] | None](
        Callable, "(transformer): why it cannot be split, None where it can", default=None
    )

    # Training

    CAUSAL_VAE = Part[bool | None](
        bool, "the first latents of a long clip are the latents of its beginning", default=None
    )
    encode_video = Part[Callable[..., Tensor] | None](
        Callable,
        "(pipe, video, generator): latents (B, C, f, h, w) as the transformer takes them, float32 "
        "on the autoencoder's device, of a video (B, 3, F, H, W) in [-1, 1]; drawn by the "
        "generator, without one the mode. ValueError unless F is 1 + a multiple of its step",
        default=None,
    )
    decode_video = Part[Callable[..., Tensor] | None](
        Callable,
        "(pipe, latents): pixels (B, 3, F, H, W) in [-1, 1] that the autoencoder makes of latents "
        "from `encode_video`; None where the cache does not measure what it gives back",
        default=None,
    )
    encode_prompt = Part[Callable[..., dict[str, Tensor]] | None](
        Callable,
        "(pipe, prompts, max_tokens): the arguments that `predict` passes to the transformer, a "
        "row for each prompt; longer prompts are cut to max_tokens, by default TEXT_TOKENS",
        default=None,
    )
    prompt_arguments = Part[Callable[..., dict[str, Tensor]] | None](
        Callable,
        "(pipe, prompt, is_guided, negative, max_tokens): what its pipelines take in place of the "
        "prompt and the negative prompt, as they would encode them; None where they take text "
        "alone",
        default=None,
    )
    predict = Part[Callable[..., Tensor] | None](
        Callable,
        "(transformer, noisy, sigma, conditions): what PREDICTS says, of noisy latents at noise "
        "levels from 0 to 1, which it maps to the model's timestep",
        default=None,
    )
    PREDICTS = Part[str](
        str,
        'what `predict` gives where a and s are the `scales`: "flow", noise - clean; "v", '
        "a noise - s clean",
        default="flow",
        choices=("flow", "v"),
    )
    scales = Part[Callable[[Mapping[str, Any], Tensor], tuple[Tensor, Tensor]]](
        Callable,
        "(schedule, sigma): scales of clean latents and of noise in their mix at noise levels (B,)"
        ", of the config of a pipeline's scheduler, {} for the published one; ValueError for a "
        "config that the model was not trained with",
        default=_flow_scales,
    )
    latent_channels = Part[Callable[[Any], int]](
        Callable,
        "(config): channels of the clips' latents, where the transformer takes others beside them",
        default_of=lambda family: lambda config: config.in_channels,
    )

    first_frame = Part[Callable[..., dict[str, Tensor]] | None](
        Callable,
        "(pipe, transformer, image, frames): conditions of `predict` for a clip of so many frames "
        "that begins with this picture, for the cache, without the axis of samples; a tensor "
        "(C, f, h, w) is cut to the latents that train. See `given.py`",
        default=None,
    )
    given_latents = Part[Callable[[Any], int]](
        Callable,
        "(transformer): latents in whose place the first frame comes, which the loss leaves out",
        default=lambda transformer: 0,
    )
    encode_prompt_with = Part[Callable[..., dict[str, Tensor]] | None](
        Callable,
        "(pipe, transformer, image, prompt, max_tokens): as `encode_prompt`, of one prompt, where "
        "its text encoder sees the first frame too; None for the image of a dropped caption",
        default=None,
    )
    TAKES_FPS = Part[bool](
        bool,
        "`predict` takes the clips' frames a second as `fps` (B,), float32, among the conditions, "
        "and `fps` of the model without them",
        default=False,
    )

    TEXT_TOKENS = Part[int | None](
        int, "tokens that the pipelines bring every prompt to, unless told otherwise", default=None
    )
    TEXT_PARTS = Part[tuple[str, ...]](
        tuple,
        "what the names of all models of a pipeline begin with that `encode_prompt` needs",
        default=("text_encoder",),
        each=str,
    )
    ONE_TEXT_LENGTH = Part[bool](
        bool, "the texts of a batch must be of one length: no mask hides padding", default=False
    )
    no_training = Part[Callable[[str | None, Mapping[str, Any]], str | None] | None](
        Callable,
        "(pipeline, config): why models of this config of a transformer cannot be trained, None "
        "where they can; of the class of pipeline by name, None where it is not known",
        default=None,
    )

    # Generation

    AUTOENCODER = Part[str | None](
        str,
        "the class of autoencoder whose latents its pipelines give as `decode_stream` takes them: "
        "with noise, order and scale of `encode_video`; None where they pack or scale in ways of "
        "their own",
        default=None,
    )
    decode_parts = Part[Callable[[Any], Callable[..., Any] | None] | None](
        Callable,
        "(vae): how AUTOENCODER is decoded a few frames at a time, bit for bit as `vae.decode`: "
        "(vae, latents (1, C, f, h, w)) to an iterator of (1, 3, F, H, W); None where it cannot "
        "be, as it is set",
        default=None,
    )
    TILED_VAE = Part[bool](
        bool, "diffusers decodes with its autoencoder in spatial tiles alone", default=False
    )
    FRAMES_ARGUMENT = Part[str](
        str, "what its pipelines call the number of frames", default="num_frames"
    )
    LATENT_AXES = Part[str](
        str,
        "axes, after the batch, of the latents that its pipelines report at the end of a step: "
        "channels, frames, height and width; tokens are frame by frame, with their channels last, "
        "and what else is seen before or after them",
        default="cfhw",
        choices=("cfhw", "fchw", "fhwc", "tokens last", "tokens first"),
    )
    LEAST_STEPS = Part[int](int, "the fewest steps that its pipelines' schedules take", default=1)

    TINY = Part[Mapping[str, Any] | None](
        Mapping,
        "how little a model for training can be: the config of one, with as many channels in as "
        "out, and without its number of blocks, DEPTH, which is put in",
        default=None,
    )
    DEPTH = Part[str](str, "the entry of a config that counts the blocks", default="num_layers")
    tiny_conditions = Part[Callable[[Any, int], dict[str, Tensor]] | None](
        Callable,
        "(config, tokens): `conditions` of `predict` with a text of so many tokens, all zero, of "
        "one sample, without the axis of samples",
        default=None,
    )

    tiny_from_frame = Part[Callable[[Mapping[str, Any]], dict[str, Any]] | None](
        Callable,
        "(config): what TINY needs besides to begin with a first frame as models of this config "
        "do",
        default=None,
    )
    tiny_first_frame = Part[Callable[..., dict[str, Tensor]] | None](
        Callable,
        "(transformer, frames, height, width): what `first_frame` gives, all zero, of a clip of "
        "this size in latents",
        default_of=lambda family: _tiny_first_frame(family) if family.first_frame else None,
    )

    # Published models

    PRESETS = Part[Mapping[str, Preset]](
        Mapping, "their names to their repositories and configs", default={}, each=Preset
    )
    SPATIAL_FACTOR = Part[int | None](int, "pixels, a side, in a latent", default=None)
    spatial_factor = Part[Callable[[Any], int | None]](
        Callable,
        "(transformer): the same of this one, where they are not alike",
        default_of=lambda family: lambda transformer: family.SPATIAL_FACTOR,
    )

    # What a forward pass costs

    layers = Part[Callable[[Any], Layers] | None](
        Callable,
        "(transformer): which tokens pass its layers, for FLOPs",
        default=None,
    )
    flops = Part[Callable[..., Flops] | None](
        Callable,
        "(transformer, video, lengths): of one call for one sample, where `layers` cannot tell; "
        "see `layers.Cost`",
        default=None,
    )

    inputs = Part[Callable[..., dict[str, Any]] | None](
        Callable,
        "(transformer, video, text, batch): arguments of one forward pass for clips of this grid "
        "and prompts of so many tokens, of any values, on the transformer's device",
        default=None,
    )

    # Longer video

    TRAINED_FRAMES = Part[int | None](
        int, "frames of the videos that the published models were trained on", default=None
    )
    trained_frames = Part[Callable[[Any], int | None]](
        Callable,
        "(transformer): the same of this one, where not all were trained alike",
        default_of=lambda family: lambda transformer: family.TRAINED_FRAMES,
    )
    TEMPORAL_FACTOR = Part[int | None](
        int,
        "frames in a latent frame, all but the first, which is one frame; None where the models "
        "differ",
        default=None,
    )
    temporal_factor = Part[Callable[[Any], int | None]](
        Callable,
        "(transformer): the same of this one, where not all models of a family are alike",
        default_of=lambda family: lambda transformer: family.TEMPORAL_FACTOR,
    )
    longest = Part[Callable[[Any], int | None] | None](
        Callable,
        "(transformer): latent frames that it has positions for, where they are a table, and None "
        "where this one's are not",
        default=None,
    )
    temporal_frequencies = Part[Callable[[Any], Tensor] | None](
        Callable,
        "(transformer): of its rotary pairs on the time axis, (pairs,) or (heads, pairs) float64 "
        "in rad a latent frame after patchify; ValueError where this one has none",
        default=None,
    )
    set_temporal_frequencies = Part[Callable[[Any, Tensor | None], None] | None](
        Callable,
        "(transformer, freqs): use these instead, or its own again for None",
        default=None,
    )
    HEADS_ALIKE = Part[bool](
        bool, "all attention heads have the same few temporal frequencies", default=True
    )
    with_temporal_frequencies = Part[Callable[..., dict[str, Any]] | None](
        Callable,
        "(transformer, freqs, ...): the arguments of a forward pass, all by name, with these "
        "frequencies instead, where the rotary table is one of them",
        default=None,
    )

    # Image prompts, which take `video_shape`, `timestep` and, for video, TEMPORAL_FACTOR besides

    GUIDANCE = Part[str | None](
        str,
        'how the pipelines run the negative prompt: "batched", as the first rows of one call, or '
        '"sequential", in a call of its own',
        default=None,
        choices=("batched", "sequential"),
    )
    NAMES_CALLS = Part[bool](
        bool,
        "where a model has a `cache_context`, its pipelines name their calls by it",
        default=True,
    )
    GUIDED = Part[str | None](
        str,
        "the variable, in a run of the pipelines, that says whether there is guidance, where the "
        "pipeline itself does not",
        default=None,
    )
    image_attentions = Part[Callable[..., list] | None](
        Callable,
        "(transformer): the attentions that an image prompt is added to, as `ImageAttention`s; "
        "families that share this function share adapters",
        default=None,
    )
    tap_image = Part[Callable[..., Callable[[], None]] | None](
        Callable,
        "(transformer, site, add): add an image prompt, where text attends with video or image; "
        "see `families.tap_image`, which does it elsewhere",
        default=None,
    )
    FIRST_FRAME_ALONE = Part[bool](
        bool,
        "the first latent is of one frame; where False, of as many as the others",
        default=True,
    )
    no_frames = Part[Callable[..., str | None] | None](
        Callable,
        "(transformer, ...): why this forward pass does not tell which frames of the video its "
        "latents are of, None where it does; only where that can be",
        default=None,
    )


# Each use beside attention, to the parts that a family needs for it.
USES = {
    "training": ("CAUSAL_VAE", "encode_video", "encode_prompt", "predict"),
    "longer video": ("TEMPORAL_FACTOR",),
    "rules on rotary frequencies": ("temporal_frequencies",),
    "image prompts": ("image_attentions",),
}

PARTS: dict[str, Part] = {
    name: part for name, part in vars(Family).items() if isinstance(part, Part)
}


@cache
def family_named(name: str) -> Family:
    """Load the family in the file `name`; ValueError, on the first call, where a part is wrong."""
    return load(name, import_module(f"{__package__}.{name}"))


def load(name: str, module: ModuleType) -> Family:
    """Check and return the family in `module`.

    Raises:
        ValueError: public names that are no parts, with the nearest part; parts of the wrong type;
            missing parts. A line for each.
    """
    held = vars(module)
    wrong = []
    for own in _defined(module):
        if not own.startswith("_") and own not in PARTS:
            near = get_close_matches(own, PARTS, n=1, cutoff=0.5)
            nearest = f"; the nearest is {near[0]}" if near else ""
            wrong.append(f"{own} is no part of a family{nearest}; helpers begin with _")
    for part in PARTS.values():
        if part.name not in held:
            wrong += [f"{part.name} is missing: {part.meaning}"] * part.required
        elif (refusal := part.refusal(held[part.name])) is not None:
            wrong.append(f"{part.name} {refusal}")
    if wrong:
        raise ValueError("\n".join(f"family {name}: {line}" for line in wrong))
    return Family(name, module)


def _defined(module: ModuleType) -> list[str]:
    """Names of the constants and functions at the top of a module's file, without imports."""
    names: list[str] = []
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, ast.FunctionDef):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            is_one = isinstance(statement, ast.AnnAssign)
            targets = [statement.target] if is_one else statement.targets
            names += [
                node.id
                for target in targets
                for node in ast.walk(target)
                if isinstance(node, ast.Name)
            ]
    return names
