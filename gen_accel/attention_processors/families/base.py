"""A model family: what the package knows of the transformers of one line of models.

A family is a subclass of `Family` in a file of this folder, and a line of `served.FAMILIES`. It
holds geometry and names; the processors' code stays diffusers' own. All parts have defaults. A
public name that is no part is refused when the class is made. Helpers begin with _.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.latents import (
    FIRST_FRAME,
    LAST_FRAME,
    decoded,
    encoded,
    pixels_of,
    scaled,
    unguided,
    unscaled,
)
from gen_accel.attention_processors.families.layers import Cost, Flops, Layers, Lengths
from gen_accel.attention_processors.families.rotary import (
    Like,
    Table,
    TemporalRotary,
    check_shape,
    stock_rotary,
)
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    ImageBranch,
    Model,
    Removable,
    SelfAttention,
    SplitPlan,
    beside_text,
    image_sites,
    in_first_call,
    in_patches,
    in_stacks,
)
from gen_accel.attention_processors.seam import add_tap
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.registry import FIRST, KINDS, LAST, VIDEO
from gen_accel.served import FAMILIES
from gen_accel.video import Coding, VideoShape, patch_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

# Arguments of a forward pass by name, to read and to make.
Given = Mapping[str, Any]
Arguments = dict[str, Any]
# The config of a transformer, and entries of a config by name.
Config = Any
Entries = Mapping[str, Any]
# (pipeline, frames asked for, its own arguments): arguments for that length, and frames made
Length = Callable[[Any, int, Given], tuple[Given, int]]
# (transformer's config, the grid of a clip, steps): forward passes that make the clip
Passes = Callable[[Config, VideoShape, int], "list[Pass]"]
# (transformer's config, pipeline's index, kinds): why these weights cannot, "" if they can
Fits = Callable[[Entries, Entries, Collection[str]], str]

SEPARATE = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SEPARATE, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
BOTH_FEED_FORWARDS = (*FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2")
# `lora_targets` of blocks of two streams, and then of one.
STREAMS = {"attention": JOINT, "feed_forward": (*BOTH_FEED_FORWARDS, "proj_mlp", "proj_out")}


@dataclass(frozen=True)
class Sizes:
    """Compression and lengths of the published models.

    Args:
        temporal: frames in a latent frame, all but the first; None if only the pipeline knows.
        spatial: pixels, a side, in a latent.
        frames: length of the videos that they were trained on.
        fps: frames a second, if their pipelines take none.
        text: tokens that the pipelines bring every prompt to, unless told otherwise.
        first_alone: the first latent is of one frame; otherwise of as many as the others.
        chunks: of an autoencoder with several latents in a chunk; then `temporal` is None.
    """

    temporal: int | None = None
    spatial: int | None = None
    frames: int | None = None
    fps: float = 16
    text: int | None = None
    first_alone: bool = True
    chunks: Coding | None = None

    def coding(self, temporal: int | None = None) -> Coding:
        """The coding of an autoencoder.

        Args:
            temporal: frames in a latent, all but the first; None for those of the sizes.
        """
        step = temporal or self.temporal or 1
        return self.chunks or Coding(step, first=1 if self.first_alone else step)


@dataclass(frozen=True)
class Attention:
    """The self-attention over the grid.

    Args:
        call: global name of the attention call in the processors.
        stacks: lists of blocks, in the order of their layers.
        name: of the attention in a block.
        text: place of the text that attends too: "before" or "after" the grid, "" for none.
        timestep: argument of the forward pass.
        rising: the timestep rises from step to step; otherwise it falls.
        masks: "alike" if each layer makes an equal mask; "pairs" if each makes a mask of all pairs
            of tokens, too long to be read, in place of which `text_lengths` are.
        heads_alike: all have the same few temporal frequencies.
    """

    call: str = "dispatch_attention_fn"
    stacks: tuple[str, ...] = ("transformer_blocks",)
    name: str = "attn"
    text: Literal["", "before", "after"] = ""
    timestep: str = "timestep"
    rising: bool = False
    masks: Literal["", "alike", "pairs"] = ""
    heads_alike: bool = True


@dataclass(frozen=True)
class Generation:
    """Facts of the pipelines beside the transformer.

    Args:
        axes: after the batch, of the latents that the pipelines report at the end of a step:
            channels, frames, height and width. Tokens are frame by frame, channels last, with what
            else is seen before or after them.
        autoencoder: the class whose latents the pipelines give as `decode_stream` takes them, with
            noise, order and scale of `encode_video`; None if they pack or scale otherwise.
        tiled: diffusers decodes in spatial tiles alone.
        frames_argument: name of the number of frames.
        prompt: arguments that take what `encode_prompt` returns in the place of texts; (): they
            take text alone.
        least_steps: fewest steps that the schedules take.
        distilled: guidance is in the weights, and a step is one call.
        sound: videos come with sound.
        unguided: arguments of the pipelines that turn off what guides beside a guidance scale.
    """

    axes: Literal["cfhw", "fchw", "fhwc", "chw", "tokens last", "tokens first"] = "cfhw"
    autoencoder: str | None = None
    tiled: bool = False
    frames_argument: str = "num_frames"
    prompt: tuple[str, ...] = ()
    least_steps: int = 1
    distilled: bool = False
    sound: bool = False
    unguided: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Facts that training needs.

    Args:
        causal_vae: the first latents of a long clip are the latents of its beginning.
        predicts: output of `predict`, with a and s of `scales`: "flow", noise - clean; "v",
            a noise - s clean.
        takes_fps: `predict` takes the clips' frames a second as `fps` (B,), float32, among the
            conditions, and the model's own without them.
        takes_mask: the pipelines encode a prompt to states and the mask of its padding, which
            the transformer takes.
        one_text_length: texts of a batch must be of one length, as no mask hides padding.
        text_parts: beginnings of the names of all models of a pipeline that encode prompts.
        first_frame: models also train from the first frame of each clip.
        last_frame: and from the first and the last one.
        frame_noise: noise level of given frames, drawn in each step as pipelines draw it.
        control: they are trained with a control video beside each clip, if `needs_control`.
        sound: they make sound beside the video, and also train on the clips' own.
        needs_sound: they do not train without it.
        tiny: config of a model as small as can be, for dry runs, without its number of blocks;
            {}: no training.
        from_frame: entries of `tiny` for given frames or a control video, each for a model that
            has it too; None: the value that the model has.
        depth: entry of a config that counts the blocks.
        text_width: entry of a config with the width of the text.
    """

    causal_vae: bool = False
    predicts: Literal["flow", "v"] = "flow"
    takes_fps: bool = False
    takes_mask: bool = False
    one_text_length: bool = False
    text_parts: tuple[str, ...] = ("text_encoder",)
    first_frame: bool = False
    last_frame: bool = False
    frame_noise: float = 0.0
    control: bool = False
    sound: bool = False
    needs_sound: bool = False
    tiny: Entries = field(default_factory=dict)
    from_frame: Entries = field(default_factory=dict)
    depth: str = "num_layers"
    text_width: str = "text_embed_dim"


@dataclass(frozen=True)
class ImagePrompts:
    """Facts that image prompts need.

    Args:
        guidance: how pipelines run the negative prompt: "batched", as the first rows of one call,
            or "sequential", in a call of its own.
        at: stack and name of the attentions, such as "blocks.attn2".
        adapters: name of the family whose adapters fit.
        names_calls: if a model has a `cache_context`, its pipelines name their calls by it.
        guided: variable, in a run of the pipelines, that tells whether there is guidance, if the
            pipeline itself does not.
        by_sample: the processor calls the attention once a sample.
    """

    guidance: Literal["batched", "sequential"] | None = None
    at: str = ""
    adapters: str = ""
    names_calls: bool = True
    guided: str | None = None
    by_sample: bool = False


class Pass(NamedTuple):
    """A forward pass that a clip is made by, and how often it runs.

    Args:
        times: in all steps together, guidance aside.
        video: the grid that attends.
        lengths: of other tokens, by the kinds of `Layers`.
        past: number of the grid's first frames that are keys alone, from a cache.
        cached: tokens whose keys and values each layer keeps meanwhile.
        is_dense: no method runs in it.
    """

    times: float
    video: VideoShape
    lengths: Lengths = {}
    past: int = 0
    cached: int = 0
    is_dense: bool = False


@dataclass(frozen=True)
class PublishedModel:
    """A published model.

    Args:
        billions: its number of parameters, which a test compares with the config.
        config: entries of its transformer's config that differ from the defaults of the class.
        temporal: frames in a latent, if the family's sizes have none.
        transformers: how many experts of this config the pipeline has.
        vae: entries of its autoencoder's config that differ from the defaults.
        pipeline: class of its pipeline, if it is not the family's first.
    """

    billions: float
    config: Entries = field(default_factory=dict)
    temporal: int | None = None
    transformers: int = 1
    vae: Entries = field(default_factory=dict)
    pipeline: str = ""


def _any_weights(config: Given, index: Given, asked: Collection[str]) -> str:
    return ""


def _as_asked(pipe: Any, frames: int, given: Given) -> tuple[Given, int]:
    return {}, frames


def in_sections(latents: str, more: int = 0) -> Length:
    """Length of a video that is made in sections of as many latent frames as the argument
    `latents` says, each decoded by itself.

    Args:
        more: latent frames of the whole video beside those of the sections, which then join.
    """

    def made(pipe: Any, frames: int, given: Given) -> tuple[Given, int]:
        default = inspect.signature(type(pipe).__call__).parameters[latents].default
        each, step = given.get(latents, default), pipe.vae_scale_factor_temporal
        if each < 1:
            raise ValueError(f"{latents} must be at least 1, got {each}")
        section = (each - 1) * step + 1
        count = -(-frames // section)
        if more:
            return {}, (count * each + more - 1) * step + 1
        return {}, (count * section - 1) // step * step + 1

    return made


def _at_once(config: Config, clip: VideoShape, steps: int) -> list[Pass]:
    return [Pass(steps, clip)]


def behind_history(latents: int, scales: Sequence[int] = (1,), **beside: int) -> Passes:
    """Passes of sections of so many latent frames, each behind 20 frames of history: 2 whole, 2
    in patches of twice the size and 16 in patches of four times. Four frames are a latent.

    Args:
        scales: divisors of height and width, in turn, for equal shares of the steps.
        beside: lengths of other tokens.
    """

    def passes(config: Config, clip: VideoShape, steps: int) -> list[Pass]:
        _, height, width = clip.grid
        count = -(-(4 * clip.frames - 3) // (4 * latents - 3))
        patches = ((2, 1), (1, 2), (4, 4))  # frames and side
        history = sum(n * -(-height // side) * -(-width // side) for n, side in patches)
        return [
            Pass(
                count * steps / len(scales),
                VideoShape(latents, max(1, height // scale), max(1, width // scale)),
                {"history": history, **beside},
            )
            for scale in scales
        ]

    return passes


@dataclass(frozen=True)
class PipelineInputs:
    """Inputs that the pipelines of one class make a video from.

    Args:
        weights: name of the weights; classes with the same name load each other's. Its first word
            is the name of a line of models.
        text: the prompt alone is enough.
        image, last_image, video: names of the arguments; "" for none.
        strength: name of the argument for the share of a video that is remade.
        alone: a last frame needs no first frame.
        together: frames go with a video.
        role: use of a video: "remade" from its own frames, "continued" in a video that begins
            with it, "prolonged" by as many frames as are asked, as "control" of another one, or as
            a "reference" of any size and length for what shall be seen and heard.
        by: function of `pipelines.generation.inputs` that makes the arguments, if they are not
            plain pictures.
        fits: why weights of this name cannot do what is asked, see `Fits`.
        model: a published model.
        both: the same for a first and a last frame, if it is another one.
        frames: the only number of frames.
        size: the default height and width, if neither signature nor config has them; or a function
            of the pipeline and a picture's height and width that gives them.
        multiple: divides heights and widths besides what the autoencoder and the patches ask for.
        joins: decodes by itself, as its latents alone do not hold its whole video.
        length: of what is made, and the arguments that it asks for, see `Length`; ValueError for
            one that cannot be made.
        passes: that make a clip without given frames but a first one, with default arguments.
    """

    weights: str
    text: bool = True
    image: str = ""
    last_image: str = ""
    video: str = ""
    strength: str = ""
    alone: bool = False
    together: bool = False
    role: str = ""
    by: str = "plain"
    fits: Fits = _any_weights
    model: str = ""
    both: str = ""
    frames: int | None = None
    size: "tuple[int, int] | Callable[[Any, int, int], tuple[int, int]] | None" = None
    multiple: int = 16
    joins: bool = False
    length: Length = _as_asked
    passes: Passes = _at_once

    @property
    def kinds(self) -> tuple[str, ...]:
        held = (self.text, *self.arguments)
        return tuple(kind for kind, has in zip(KINDS, held, strict=True) if has)

    @property
    def arguments(self) -> tuple[str, str, str]:
        """Names of the arguments for the kinds of files, "" for none."""
        return self.image, self.last_image, self.video

    def lacks(self, asked: Collection[str]) -> bool:
        """Whether pipelines of this class do not take what is asked, or need more."""
        if any(kind not in self.kinds for kind in asked):
            return True
        if VIDEO in asked and len(asked) > 1:
            return not self.together
        if LAST in asked and FIRST not in asked:
            return not self.alone
        return not asked and not self.text

    def role_of(self, strength: float | None) -> str:
        """Use of a video; one that could be continued is remade if a strength is given."""
        return "remade" if strength is not None else self.role


@dataclass(frozen=True)
class Colors:
    """Published linear map of an autoencoder's latents to colours from -1 to 1, as in ComfyUI's
    `comfy/latent_formats.py` (https://github.com/comfyanonymous/ComfyUI, commit 75399d7).

    Args:
        autoencoder: its class.
        entry, value: of its config, by which it differs from others of the class.
        rows: factors of red, of green and of blue, one for each channel of the latents, as text.
    """

    autoencoder: str
    entry: str
    value: int | tuple[int, ...]
    rows: str
    bias: tuple[float, float, float]

    @property
    def factors(self) -> Tensor:
        """(3, C)"""
        return torch.tensor([float(x) for x in self.rows.split()]).view(3, -1)


@dataclass(frozen=True)
class OriginalLayer:
    """Place of a layer of diffusers in the block of the original model, as ComfyUI names it.

    Args:
        name: of the original layer.
        slot: part of its rows, if several layers of diffusers are one there.
        widths: rows of the parts, in units of the first.
        is_swapped: the halves of its rows are in the other order.
    """

    name: str
    slot: int = 0
    widths: tuple[int, ...] = (1,)
    is_swapped: bool = False

    @classmethod
    def fused(
        cls, name: str, layers: Sequence[str], widths: tuple[int, ...] = (1, 1, 1)
    ) -> dict[str, "OriginalLayer"]:
        """Places of several layers of diffusers in one original layer."""
        return {layer: cls(name, slot, widths) for slot, layer in enumerate(layers)}


# Stacks of blocks, in the order of their numbers, to the original stack and its layers; None for
# layers of the same names. "" for layers outside of blocks.
Layout = Mapping[str, tuple[str, Mapping[str, OriginalLayer] | None]]


def takes_frames(config: Entries) -> bool:
    """Whether there are channels for the frames to keep, beside the noisy latents."""
    channels = config.get("in_channels", 16)
    return channels > (config.get("out_channels") or channels)


class Family:
    """Base of all families, with the parts that most share.

    Args:
        name: in `served.FAMILIES`.
    """

    # What it is
    models: ClassVar[str] = ""  # the published ones, in words
    order: ClassVar[str] = ""  # of the tokens of the self-attention, in words
    kind: ClassVar[Literal["video", "frames", "image"]] = "video"  # frames: each attends alone
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": SEPARATE,
        "feed_forward": FEED_FORWARD,
    }  # groups of layers, to the ends of their names inside the blocks
    sizes: ClassVar[Sizes] = Sizes()
    attention: ClassVar[Attention] = Attention()
    generation: ClassVar[Generation] = Generation()
    training: ClassVar[Training] = Training()
    image_prompts: ClassVar[ImagePrompts] = ImagePrompts()
    presets: ClassVar[Mapping[str, PublishedModel]] = {}  # by name
    pipelines: ClassVar[Mapping[str, PipelineInputs | str]] = {}  # or why `generate` uses none
    parts: ClassVar[Mapping[str, str]] = {}  # of the pipelines, as `measure/published.json` has
    colors: ClassVar[tuple[Colors, ...]] = ()
    comfyui: ClassVar[Layout] = {}  # for LoRAs

    def __init__(self, name: str) -> None:
        self.name = name

    def __init_subclass__(cls) -> None:
        known = {name for base in cls.__mro__[1:] for name in vars(base)}
        for name in vars(cls):
            if not name.startswith("_") and name not in known:
                parts = [part for part in vars(Family) if not part.startswith("_")]
                near = get_close_matches(name, parts, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? Helpers" if near else "helpers"
                raise TypeError(
                    f"{cls.__name__}.{name} is no part of a family: {hint} begin with _"
                )

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the transformer classes that it serves."""
        return FAMILIES[self.name].transformers

    def serves(self, use: str) -> bool:
        """Whether the family has what a key of `USES` needs."""
        return USES[use](self)

    def _has(self, part: str) -> bool:
        """Whether the family has a part of its own in the place of the default."""
        return getattr(type(self), part) is not getattr(Family, part)

    def sizes_of(self, config: Config) -> Sizes:
        """The sizes of a model by its config, as not all of a family are alike."""
        return self.sizes

    # One forward pass

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        """The attentions over the tokens of video or image."""
        own = self.attention
        return in_stacks(transformer, own.stacks, *self._heads(transformer.config), own.name)

    def _heads(self, config: Config) -> tuple[int, int]:
        """Number of attention heads, and the dim of one."""
        return config.num_attention_heads, config.attention_head_dim

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The token grid, one frame for an image, and as its text all other tokens that attend
        with it. ValueError if patches leave a rest."""
        grid = self._grid(transformer, given["hidden_states"])
        text = self._beside(transformer, given)
        before = text if self.attention.text == "before" else 0
        return Tokens(VideoShape(*grid, text=text), before)

    def _grid(self, transformer: Model, latents: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens in latents, whose axes are of `generation`."""
        axes, patch = self.generation.axes, transformer.config.patch_size
        frames = latents.shape[1 + axes.index("f")] if "f" in axes else 1
        sides = latents.shape[1 + axes.index("h")], latents.shape[1 + axes.index("w")]
        if isinstance(patch, int):
            patch = getattr(transformer.config, "patch_size_t", None) or 1, patch, patch
        return in_patches((frames, *sides), patch)

    def _beside(self, transformer: Model, given: Given) -> int:
        """Number of tokens that attend with the grid, padding included."""
        return given["encoder_hidden_states"].shape[1] if self.attention.text else 0

    def stays_dense(self, transformer: Model, given: Given) -> str | None:
        """Reason why a forward pass runs the model's own attention, whatever is attached; None if
        a method may run."""
        return None

    def lighten(self, transformer: Model, is_on: Callable[[], bool]) -> Sequence[Removable]:
        """Spare the model what it computes again to the same result, up to rounding, whenever
        `is_on`. Returns what takes this off."""
        return ()

    def timestep(self, given: Given) -> Tensor:
        """(B,) or (), or more if parts of the grid have their own."""
        return torch.as_tensor(given[self.attention.timestep])

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...] | None:
        """Tokens of each sample's text, if a mask hides its padding; None without a mask, or if
        padding is not at the end. May wait for the device."""
        return None

    def context_parallel(self, transformer: Model) -> SplitPlan | None:
        """A plan by which diffusers splits it over processes; None for diffusers' own. ValueError,
        with the reason, if it cannot be split."""
        return None

    # Training

    def no_training(self, pipeline: str | None, config: Entries) -> str | None:
        """Reason why models of this config of a transformer cannot be trained, None if they can.

        Args:
            pipeline: name of its class; None if unknown.
        """
        return None

    @torch.no_grad()
    def encode_video(
        self, pipe: "DiffusionPipeline", video: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents (B, C, f, h, w) as the transformer takes them, float32 on the autoencoder's
        device, of a video (B, 3, F, H, W) in [-1, 1].

        Args:
            generator: draws the latents; without one they are the mode.

        Raises:
            ValueError: F is not 1 + a multiple of the autoencoder's step.
        """
        return scaled(pipe.vae, encoded(pipe, video, generator))

    def decode_video(self, pipe: "DiffusionPipeline", latents: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] of latents from `encode_video`."""
        return decoded(pipe, unscaled(pipe.vae, latents))

    @torch.no_grad()
    def encode_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts into the arguments that `predict` passes to the transformer, a row
        each.

        Args:
            max_tokens: the pipelines' `max_sequence_length`; longer prompts are cut, shorter ones
                padded.

        Returns:
            encoder_hidden_states (B, max_tokens, D), in the text encoder's dtype, and, if the
            transformer takes it, encoder_attention_mask (B, max_tokens), 0 for padding.
        """
        found = unguided(pipe, prompts, self._text(max_tokens))
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return dict(zip(names[: 1 + self.training.takes_mask], found, strict=False))

    def _text(self, max_tokens: int | None) -> int:
        tokens = self.sizes.text if max_tokens is None else max_tokens
        assert tokens is not None
        return tokens

    def predict(
        self, transformer: Model, noisy: Tensor, sigma: Tensor, conditions: Given
    ) -> Tensor:
        """Return the target that `training.predicts` names, of `noisy` = a clean + s noise, with
        the scales a and s of `scales`.

        Args:
            noisy: (B, C, f, h, w) latents.
            sigma: (B,) in [0, 1].
            conditions: from `encode_prompt`, and from `first_frame` and `last_frame`, or from
                `control`, if they are given.
        """
        if not self.training.tiny:
            raise ValueError(f"no training for {self.models}")
        return transformer(noisy, timestep=sigma * 1000, **conditions, return_dict=False)[0]

    def sound_tokens(self, config: Config, frames: int, fps: float) -> int:
        """Number of the tokens of sound of a clip of so many pixel frames."""
        raise ValueError(f"no training with sound for {self.models}")

    def sound_rate(self, pipe: "DiffusionPipeline") -> int:
        """Samples a second of the sound that `encode_sound` takes."""
        raise ValueError(f"no training with sound for {self.models}")

    def encode_sound(self, pipe: "DiffusionPipeline", sound: Tensor) -> Tensor:
        """Latents (tokens, D) as `predict_heard` takes them, float32 on the autoencoder's device,
        in the order of time, of sound in stereo, (2, N) in [-1, 1]."""
        raise ValueError(f"no training with sound for {self.models}")

    def encode_heard_prompt(
        self, pipe: "DiffusionPipeline", prompts: Sequence[str], max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Encode B prompts as `encode_prompt`, for video and sound."""
        raise ValueError(f"no training with sound for {self.models}")

    def predict_heard(
        self,
        transformer: Model,
        noisy: Tensor,
        sound: Tensor,
        sigma: Tensor,
        of_sound: Tensor,
        conditions: Given,
    ) -> tuple[Tensor, Tensor]:
        """Predict as `predict`, for the video and for its noisy sound (B, tokens, D).

        Args:
            of_sound: noise levels of the sound (B,).
            conditions: from `encode_heard_prompt`.
        """
        raise ValueError(f"no training with sound for {self.models}")

    def scales(self, schedule: Entries, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of clean latents and of noise in their mix at noise levels (B,).

        Args:
            schedule: config of a pipeline's scheduler, {} for the published one.

        Raises:
            ValueError: a config that the model was not trained with.
        """
        return 1 - sigma, sigma

    def latent_channels(self, config: Config) -> int:
        """Channels of the clips' latents, beside which a transformer may take others."""
        return getattr(config, "out_channels", None) or config.in_channels

    @torch.no_grad()
    def first_frame(
        self, pipe: "DiffusionPipeline", transformer: Model, image: "Image", frames: int
    ) -> dict[str, Tensor]:
        """Conditions of `predict` for a clip of so many frames that begins with this picture,
        without the axis of samples. A tensor (C, f, h, w) is cut to the latents that train."""
        return {FIRST_FRAME: self.encode_video(pipe, pixels_of(pipe, image))[0]}

    def last_frame(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        first: "Image",
        last: "Image",
        frames: int,
    ) -> dict[str, Tensor]:
        """Conditions that a clip's last frame adds to those of `first_frame`, or that take the
        place of one of them. Those of a shorter clip are others."""
        raise ValueError(f"no training from a last frame for {self.models}")

    def needs_control(self, config: Entries) -> bool:
        """Whether a model of this config of a transformer takes a control video in each call."""
        return False

    def control(self, pipe: "DiffusionPipeline", frames: Sequence["Image"]) -> dict[str, Tensor]:
        """Conditions of a clip with a control video of these frames, without the axis of samples.
        A tensor (C, f, h, w) is cut to the latents that train."""
        raise ValueError(f"no training with a control video for {self.models}")

    def given_latents(self, transformer: Model) -> int:
        """Latents in whose place the first frame comes, which the loss leaves out."""
        return 0 if takes_frames(transformer.config) else 1

    def encode_prompt_with(
        self,
        pipe: "DiffusionPipeline",
        transformer: Model,
        images: Sequence["Image"],
        prompt: str,
        max_tokens: int | None = None,
    ) -> dict[str, Tensor]:
        """Encode a prompt as `encode_prompt`, by a text encoder that sees the given frames too.

        Args:
            images: the first frame, and the last one if it is given; () for a dropped caption.
        """
        return self.encode_prompt(pipe, [prompt], max_tokens)

    def tiny_conditions(self, config: Config, tokens: int) -> dict[str, Tensor]:
        """Conditions of `predict` with a text of so many tokens, all zero, of one sample, without
        the axis of samples."""
        width = getattr(config, self.training.text_width)
        found = {"encoder_hidden_states": torch.zeros(tokens, width)}
        mask = {"encoder_attention_mask": torch.ones(tokens, dtype=torch.bool)}
        return found | (mask if self.training.takes_mask else {})

    def tiny_first_frame(
        self, transformer: Model, frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        """Return zeros like the tensors of `first_frame`, of a clip of this size in latents."""
        channels = self.latent_channels(transformer.config)
        return {FIRST_FRAME: torch.zeros(channels, 1, height, width)}

    def tiny_last_frame(self, transformer: Model, height: int, width: int) -> dict[str, Tensor]:
        """Return zeros like the tensors of `last_frame`, of a clip of this size in latents."""
        channels = self.latent_channels(transformer.config)
        return {LAST_FRAME: torch.zeros(channels, 1, height, width)}

    def tiny_control(
        self, transformer: Model, frames: int, height: int, width: int
    ) -> dict[str, Tensor]:
        """Return zeros like the tensors of `control`, of a clip of this size in latents."""
        raise ValueError(f"no training with a control video for {self.models}")

    def tiny_sound(
        self, config: Config, frames: int, fps: float, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents of sound of a clip of so many pixel frames, and conditions of a text
        of so many tokens for it, all zero, of one sample."""
        raise ValueError(f"no training with sound for {self.models}")

    # Cost

    def layers(self, transformer: Model) -> Layers:
        """The tokens that pass its layers, for FLOPs."""
        return Layers({}, {})

    def cost(self, transformer: Model) -> Callable[[VideoShape, Lengths], Flops]:
        """(video, lengths of other tokens) to the FLOPs of one call for one sample."""
        sites = self.self_attentions(transformer)
        return Cost(transformer, self.layers(transformer), sites, self.kind == "frames")

    def inputs(self, transformer: Model, video: VideoShape, text: int, batch: int) -> Arguments:
        """Arguments of one forward pass for clips of this grid and prompts of so many tokens, of
        any values, on the transformer's device; see "traced calls" of `USES`."""
        config, like = transformer.config, self._like(transformer)
        sides = (n * p for n, p in zip(video.grid, patch_of(config), strict=True))
        given = {
            "hidden_states": torch.zeros(batch, config.in_channels, *sides, **like),
            "timestep": torch.zeros(batch, **like),
        }
        for name, x in self.tiny_conditions(config, text).items():
            dtype = like["dtype"] if x.is_floating_point() else x.dtype
            given[name] = torch.stack([x] * batch).to(like["device"], dtype)
        return given

    def _like(self, transformer: Model) -> Like:
        return Like(device=transformer.device, dtype=transformer.dtype)

    # Longer video

    def longest(self, transformer: Model) -> int | None:
        """Latent frames after patchify that it has positions for; None for any number."""
        return None

    def temporal_frequencies(self, transformer: Model) -> Tensor:
        """The model's own rotary frequencies of the time axis, whatever is set: (pairs,) or
        (heads, pairs) float64 in rad a latent frame after patchify.

        Raises:
            ValueError: a model without them.
        """
        raise ValueError(f"no rules on rotary frequencies for {self.models}")

    def set_temporal_frequencies(self, transformer: Model, freqs: Tensor | None) -> None:
        """Use other rotary frequencies on the time axis, or its own, bit for bit, for None.

        Args:
            freqs: as `temporal_frequencies` gives them.

        Raises:
            ValueError: freqs of another shape.
        """
        stock = stock_rotary(transformer)
        if freqs is None:
            transformer.rope = stock
            return
        check_shape(freqs, self.temporal_frequencies(transformer).shape)
        numbers = self._rotary_numbers(transformer, freqs.double().cpu())
        transformer.rope = TemporalRotary(stock, numbers, self._rotary_table)

    def turned(
        self, transformer: Model, keys: Tensor, frames: int, fps: Tensor | None = None
    ) -> Tensor:
        """Keys (B, H, N, D), as the rotary table leaves them, of the same tokens so many latent
        frames after patchify later, or earlier for a negative number.

        Args:
            fps: of each sample (B,), as `predict` was told; None: it was not.

        Raises:
            ValueError: a model without rotary frequencies of its own on the time axis.
        """
        raise ValueError(f"no videos chunk by chunk with {self.models}")

    def _rotary_numbers(self, transformer: Model, freqs: Tensor) -> Sequence:
        """Return what `_rotary_table` needs of frequencies, as numbers."""
        return freqs.tolist()

    def _rotary_table(self, stock: Model, numbers: Sequence, *args: Any, **kwargs: Any) -> Table:
        """The table of the model's own rotary module, with other frequencies on the time axis."""
        raise NotImplementedError

    def with_temporal_frequencies(
        self, transformer: Model, freqs: Tensor, given: Given
    ) -> Arguments:
        """The arguments of a forward pass with these frequencies in the rotary table that is one
        of them; see "passed rotary tables" of `USES`."""
        return dict(given)

    # Image prompts, for which `tokens`, `timestep` and, for video, `sizes` are needed too

    def image_attentions(self, transformer: Model) -> list[ImageAttention]:
        """The attentions that an image prompt is added to; families that share them share
        adapters."""
        stack, _, name = self.image_prompts.at.rpartition(".")
        blocks = range(len(transformer.get_submodule(stack)))
        sites = image_sites(transformer, [f"{stack}.{i}.{name}" for i in blocks])
        return [site._replace(by_sample=self.image_prompts.by_sample) for site in sites]

    def tap_image(
        self, transformer: nn.Module, site: ImageAttention, add: ImageBranch
    ) -> Callable[[], None]:
        """Add what `add(q, samples)` gives for the queries q (b, N, H, D) of video or image and
        the slice of the batch that they are: (b, N, H, D), or None for nothing. If each frame
        attends by itself, b counts the frames of all samples. Of the attentions that a processor
        sums, only one is added to.

        Returns:
            A function that takes it off.
        """
        call, place = self.attention.call, self.attention.text
        own = self.self_attentions(transformer) if place else []
        tap = partial(in_first_call, add)
        if any(site.module is one.module for one in own):
            tap = partial(beside_text, add, place == "before", site.by_sample)
        return add_tap(site.module, call, tap, model=transformer)

    def no_frames(self, transformer: Model, given: Given) -> str | None:
        """Reason why this forward pass does not tell the frames of the video in its latents, None
        if it does."""
        return None


# Each use beside attention, to whether a family has what it needs.
USES: dict[str, Callable[[Family], bool]] = {
    "training": lambda family: bool(family.training.tiny),
    "longer video": lambda family: family.sizes.temporal is not None,
    "rules on rotary frequencies": lambda family: family._has("temporal_frequencies"),
    "image prompts": lambda family: family.image_prompts.adapters != "",
    "streams": lambda family: family._has("turned"),
    "passed rotary tables": lambda family: family._has("with_temporal_frequencies"),
    "encoded prompts": lambda family: bool(family.generation.prompt),
    "prompts with a first frame": lambda family: family._has("encode_prompt_with"),
    "lengths of texts": lambda family: family._has("text_lengths"),
    "traced calls": lambda family: family._has("inputs"),
}


@lru_cache
def argument_names(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a model's forward pass, by its class."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore


def by_name(names: Sequence[str], args: tuple, kwargs: Given) -> Arguments:
    """The arguments of a forward pass by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
