"""Sparse attention on a model of ComfyUI's, by ComfyUI's own hooks.

ComfyUI's models are not those of diffusers, so that nothing of `gen_accel.attach` serves here:

- A wrapper of kind "apply_model" sees the latents of each forward pass, and so the grid comes from
  the live call. It lies outside of what torch.compile traces, and around all models.
- For that pass alone it puts `optimized_attention_override` into the live `transformer_options`,
  where it gets every attention call of the model and the function that would have answered it. So
  the order of nodes does not matter: what another node put there answers what stays dense.

Written for ComfyUI 0.19.3 (comfy/patcher_extension.py, comfy/ldm/modules/attention.py).
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel import VideoShape
from gen_accel.attention_processors.methods.dense import Full

from .host import outside_graphs
from .layouts import TEXT, Grid, Layout, Place, class_name, layout_of
from .moments import (
    NEVER,
    Memories,
    Moment,
    computed,
    moment_of,
    why_not,
)

KEY = "gen_accel_sparse_attention"
OVERRIDE = "optimized_attention_override"
EXTENSIONS = "gen_accel_extensions"  # of the live pass, by all nodes
DEPTH = "gen_accel_depth"  # how many of our overrides are asked after this one
LOG = "Sparse Attention (gen_accel): "
HIDDEN = -1e4  # a mask's values from here on hide a key


def put_on(
    model: Any,
    *,
    choose: Callable[[VideoShape], tuple[Any, float | None]],
    start_percent: float,
    end_percent: float,
    dense_blocks: frozenset[int],
    min_tokens: int,
    more: "More | None" = None,
) -> Any:
    """A copy of a ModelPatcher with sparse attention; `model` stays as it is.

    Args:
        choose: the method for a video and the density that it has there.
        start_percent, end_percent: shares of the sampling, between which it is sparse.
        dense_blocks: numbers of transformer blocks that stay dense.
        min_tokens: below which it stays dense.
        more: see `More`.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    sparse = SparseAttention(
        choose=choose,
        percents=(start_percent, end_percent),
        dense_blocks=dense_blocks,
        min_tokens=min_tokens,
        layout=layout_of(diffusion_model),
        more=more or More(),
    )
    if any(one.more.gates for one in model.get_attachment(KEY) or ()):
        raise ValueError(
            "this model has the gates of Load Gates (gen_accel), which other sparse attention "
            "does not use: take one of the two nodes off"
        )
    if sparse.layout is None:
        name = class_name(diffusion_model)
        logging.warning(f"{LOG}the order of tokens in {name} is not known; it stays dense")
    patched = model.clone()
    attached = (*(model.get_attachment(KEY) or ()), sparse)
    patched.set_attachments(KEY, attached)
    # Plain functions: a deep copy of the options would copy the object behind a bound method.
    patched.add_wrapper_with_key(
        "apply_model", KEY, lambda *args, **kwargs: sparse.watch(*args, **kwargs)
    )
    patched.add_callback_with_key("on_cleanup", KEY, lambda *args: sparse.report(*args))
    return patched


@dataclass(frozen=True, eq=False)
class More:
    """Wishes of some nodes beside a method.

    Args:
        schedule: further layers and steps that stay dense, a `gen_accel.Schedule`.
        branches: trained parameters of the method, by the number of the layer.
        gates: trained gates of the method, by the number of the layer; a number is the weight of
            the gate that the model itself has.
        extensions: `AttentionExtension`s for longer video, which hold in dense calls too.
        extra_tokens: a call with more tokens beside the video stays dense.
        verbose: whether a run is reported.
    """

    schedule: Any = NEVER
    branches: Mapping[int, nn.Module] = field(default_factory=dict)
    gates: Mapping[int, nn.Module | float] = field(default_factory=dict)
    extensions: tuple[Any, ...] = ()
    extra_tokens: int = 1 << 20
    verbose: bool = True

    def branch(self, layer: int | None) -> nn.Module | None:
        return None if layer is None else self.branches.get(layer)


class SparseAttention:
    """Attention over the grid of the latents; all other calls stay alone.

    Args:
        choose: the method for a video and the density that it has there.
        percents: shares of the sampling, between which it is sparse.
        dense_blocks: numbers of transformer blocks that stay dense.
        min_tokens: below which it stays dense.
        layout: None where the model's is not known.
        more: what some nodes ask for beside.
    """

    def __init__(
        self,
        *,
        choose: Callable[[VideoShape], tuple[Any, float | None]],
        percents: tuple[float, float],
        dense_blocks: frozenset[int],
        min_tokens: int,
        layout: Layout | None,
        more: More,
    ) -> None:
        self.choose, self.percents, self.layout = choose, percents, layout
        self.dense_blocks, self.min_tokens, self.more = dense_blocks, min_tokens, more
        self.now, self.memories = _Now(), Memories()
        self.counts: Counter[str] = Counter()

    def watch(
        self,
        forward: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Wrap `apply_model` of a BaseModel, which is `forward.class_obj`.

        Args:
            x: latents, (B, C, T, H, W) of a video; packed where `latent_shapes` says so.
        """
        options = {} if transformer_options is None else transformer_options
        shape = kwargs["latent_shapes"][0] if "latent_shapes" in kwargs else x.shape
        before, now = options.get(OVERRIDE), self.now
        now.grid = self.layout.grid(tuple(shape)) if self.layout is not None else None
        now.inside = self._inside(forward.class_obj.model_sampling, options)
        now.previous, now.calls, now.doubles, now.mask = before, 0, 0, None
        now.moment, now.depth = moment_of(options), options.get(DEPTH, 0)
        live = {
            OVERRIDE: lambda *args, **kwargs: self.attend(*args, **kwargs),
            DEPTH: now.depth + 1,
            EXTENSIONS: (*options.get(EXTENSIONS, ()), *self.more.extensions),
            TEXT: None if c_crossattn is None else c_crossattn.shape[1],
        }
        kept = {name: options[name] for name in live if name in options}
        options |= live
        with ExitStack() as stack:
            stack.callback(self._leave, options, live, kept)
            self._listen(forward.class_obj.diffusion_model, stack)
            out = forward(x, t, c_concat, c_crossattn, control, options, **kwargs)
            if self.now.hidden:
                raise ValueError(
                    f"the gate of block {min(self.now.hidden)} was not used: another node "
                    "computes its attention, as ComfyUI's Model Sparse Attention does; take that "
                    "one off"
                )
            return out

    def _leave(
        self, options: dict[str, Any], live: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> None:
        """Put back what the options had before a pass."""
        self.now.grid = self.now.previous = self.now.mask = None
        self.now.hidden.clear()
        self.now.model = None
        for name in live:
            options.pop(name, None)
        options |= kept

    def _listen(self, model: nn.Module, stack: ExitStack) -> None:
        """Remember for this pass the hidden states that the gates read."""
        if not self.more.gates:
            return
        assert self.layout is not None
        if isinstance(model, torch._dynamo.OptimizedModule):
            raise ValueError(
                "gates read hidden states, which a compiled model does not show: take "
                "TorchCompileModel off"
            )
        hidden, self.now.model = self.now.hidden, model
        for number in self.more.gates:
            layer = model.get_submodule(str(self.layout.projection).format(number))

            def see(module: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
                hidden[number] = args[0]

            stack.callback(layer.register_forward_pre_hook(see).remove)

    def _gate(self, layer: int | None, video: VideoShape, heads: int) -> Tensor | None:
        """(B, H, N, D) of the gate of a layer; None for one without."""
        if not self.more.gates:
            return None
        if layer is None:
            raise ValueError(
                "the number of the block is not known, which gates need: update ComfyUI to 0.19.3 "
                "or later"
            )
        if video.text and not video.parts:
            raise ValueError(
                "this ComfyUI does not say which tokens are words, pictures and sound, which "
                "gates need: update ComfyUI to 0.35 or later"
            )
        gate = self.more.gates.get(layer)
        if gate is None:
            return None
        seen = self.now.hidden.pop(layer, None)
        if seen is None or seen.shape[-2] != video.tokens:
            raise ValueError(
                f"the gate of block {layer} found no hidden states for the {video.tokens} tokens "
                "of its attention: another node replaces this block, take it off"
            )
        if isinstance(gate, nn.Module):
            # Kept where they are, as ComfyUI knows nothing of their memory: gigabytes for FastH3.
            held = {name: x.to(seen.device) for name, x in gate.named_parameters()}
            out = torch.func.functional_call(gate, held, seen)
        else:
            assert self.now.model is not None
            assert self.layout is not None
            out = self.now.model.get_submodule(str(self.layout.gate).format(layer))(seen)
            out = out if gate == 1 else out * gate
        if out.ndim == 2:  # MiniMax-H3 has no batches
            out = out.unsqueeze(0)
        return out.unflatten(2, (heads, -1)).transpose(1, 2)

    # ComfyUI's TorchCompileModel guards nothing of transformer_options, so that a graph would hold
    # the block, the step and the grid of the first call forever.
    @torch.compiler.disable(recursive=True)
    def attend(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Attend in the place of `func`, with scores in `attn_precision` or better.

        Args:
            q, k, v: (B, N, H D), or with `skip_reshape` (B, H, N, D).

        Returns:
            (B, N, H D), or with `skip_output_reshape` (B, H, N, D).
        """
        options = kwargs.get("transformer_options") or {}
        place, reason = self._place(q, k, v, skip_reshape, options)
        extensions = () if place is None else _active(options, place.video)
        # The last of our nodes that is asked holds techniques up where all stay dense.
        extends = bool(extensions) and self.now.depth == 0
        seen = None
        if place is not None and (not reason or extends):
            seen = self._seen(mask, place, len(q))
        if self.now.hidden and (reason or seen is None):
            raise ValueError(
                f"the gate of block {min(self.now.hidden)} has no use in attention that stays "
                f"dense ({reason or 'a mask'}): take Load Gates (gen_accel) off"
            )
        if seen is None:
            self.counts[f"dense: {reason or 'a mask'}"] += 1
            call = func if self.now.previous is None else _behind(self.now.previous, func)
            return call(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        if not skip_reshape:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        assert place is not None
        with outside_graphs():
            gate = None if reason else self._gate(self.now.moment.layer, place.video, heads)
            rest = kwargs.get("scale"), extensions, reason
            out = self._sparse(q, k, v, seen, *rest, gate=gate)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def report(self, *patcher: Any) -> None:
        """Log what the attention calls of a run came to."""
        for outcome, calls in self.counts.most_common() if self.more.verbose else ():
            logging.info(f"{LOG}%d attention calls %s", calls, outcome)
        if not self.counts:
            logging.warning(
                f"{LOG}no attention call came by: this model does not call ComfyUI's attention, "
                "or does not hand transformer_options to it"
            )
        self.counts.clear()
        self.memories.clear()

    def expected(self, video: VideoShape, moment: Moment) -> tuple[float | None, str]:
        """The density in a layer and step that are to come, or None and why it will be dense."""
        first, last = self.percents
        progress = 0.0 if moment.step is None or not moment.steps else moment.step / moment.steps
        if video.tokens < self.min_tokens:
            return None, "fewer than min_tokens"
        if moment.layer in self.dense_blocks:
            return None, "dense_blocks"
        if not first <= progress <= last:
            return None, "outside of start_percent and end_percent"
        if why := moment.why_dense(self.more.schedule):
            return None, why
        method, density = self.choose(video)
        if why := why_not(method, moment):
            return None, why
        return moment.method(method).density(video) if density is None else density, ""

    def _inside(self, sampling: Any, options: dict[str, Any]) -> bool:
        """Tell whether the step lies between the two percents. `sampling` is the one that runs,
        with all that nodes after this one did to it."""
        if "sigmas" not in options:
            return True
        first, last = (float(sampling.percent_to_sigma(percent)) for percent in self.percents)
        return last <= float(options["sigmas"][0]) <= first

    def _place(
        self, q: Tensor, k: Tensor, v: Tensor, skip_reshape: bool, options: dict[str, Any]
    ) -> tuple[Place | None, str]:
        """Find the video in a call, or None; and why it stays dense, "" for sparse."""
        tokens, grid, layout = q.shape[2 if skip_reshape else 1], self.now.grid, self.layout
        if not q.shape == k.shape == v.shape:
            return None, "cross-attention, or fewer heads of keys"
        if layout is None:
            return None, "the order of tokens in this model is not known"
        if grid is None:
            return None, "the model shows no latents (B, C, T, H, W) or (B, C, H, W)"
        width = q.shape[1] * q.shape[3] if skip_reshape else q.shape[2]
        if layout.width is not None and width != layout.width:
            return None, "self-attention over something else than the video"
        place = layout.find(grid, tokens, options)
        if place is None:
            shown = VideoShape(*grid)
            return None, f"{tokens} tokens, the grid has {shown}; the place of others is not known"
        self.now.calls += 1
        return place, self._why_dense(place.video, layout, options)

    def _why_dense(self, video: VideoShape, layout: Layout, options: dict[str, Any]) -> str:
        tokens, block = video.tokens, self._block(layout, options)
        # First of all: blocks of the second kind are counted on from the first, dense ones too.
        self.now.moment = self.now.moment.at(self._layer(block, options))
        if tokens < self.min_tokens:
            return f"{tokens} tokens, fewer than min_tokens"
        if video.text > self.more.extra_tokens:
            return f"{video.text} tokens beside the video, more than extra_tokens"
        if self.dense_blocks:
            if block is None:
                return "the number of the block is not known, which dense_blocks needs"
            if block in self.dense_blocks:
                return "dense_blocks"
        if not self.now.inside:
            return "outside of start_percent and end_percent"
        why = self.now.moment.why_dense(self.more.schedule)
        method, density = (None, 0.0) if why else self.choose(video)
        why = why or why_not(method, self.now.moment)
        if not why and video.frames == 1 and density == 1 and not self.more.gates:
            return "the method keeps all of a single frame"
        return why

    def _layer(self, block: int | None, options: dict[str, Any]) -> int | None:
        """Number of the block in the whole model: models with blocks of two kinds count each
        kind from 0."""
        if block is None or options.get("block_type") != "single":
            self.now.doubles = self.now.doubles if block is None else block + 1
            return block
        return self.now.doubles + block

    def _block(self, layout: Layout, options: dict[str, Any]) -> int | None:
        """Number of the block, or None where it is not known. Models that say none have one
        self-attention in each block; where another node replaces blocks, some may be left out."""
        if layout.numbers_blocks or "block_index" in options:
            return options.get("block_index")
        return None if options.get("patches_replace", {}).get("dit") else self.now.calls - 1

    def _seen(self, mask: Tensor | None, place: Place, batch: int) -> "list[Seen] | None":
        """Find what each row of the batch sees; a single entry holds for all rows. None for a mask
        that does more than hide tokens beside the video."""
        if mask is None:
            return [Seen(place.video, place.front)]
        # Once for all blocks that share it, as reading it waits for the device.
        if self.now.mask is None or self.now.mask[0] is not mask:
            self.now.mask = mask, _seen_through(mask, place, batch)
        return self.now.mask[1]

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: "list[Seen]",
        scale: float | None,
        extensions: tuple[Any, ...],
        reason: str,
        row: int = 0,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Attend in the model's order of tokens. Zeros at the tokens that are not seen: nothing
        reads them.

        Args:
            q, k, v: (B, H, N, D), as the result.
            reason: why it stays dense but for `extensions`; "" where it is sparse.
            row: number of the first sample, where they see different texts.
            gate: of each token, as q.
        """
        rest = scale, extensions, reason
        if len(seen) > 1:
            gates = [None] * len(seen) if gate is None else gate.split(1)
            rows = enumerate(zip(q.split(1), k.split(1), v.split(1), seen, gates, strict=True))
            return torch.cat(
                [self._sparse(a, b, c, [one], *rest, row, g) for row, (a, b, c, one, g) in rows]
            )
        [part] = seen
        if part.tokens is not None:
            whole, index = torch.zeros_like(q), part.tokens
            q, k, v = (x.index_select(2, index) for x in (q, k, v))
            gate = None if gate is None else gate.index_select(2, index)
            out = self._sparse(q, k, v, [Seen(part.video, part.front)], *rest, row, gate)
            return whole.index_copy(2, index, out)
        if part.front:  # to the end, where gen_accel has its text
            q, k, v = (x.roll(-part.front, dims=2) for x in (q, k, v))
            gate = None if gate is None else gate.roll(-part.front, dims=2)
        out = self._computed(q, k, v, part.video, *rest, row, gate)
        return out.roll(part.front, dims=2) if part.front else out

    def _computed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        video: VideoShape,
        scale: float | None,
        extensions: tuple[Any, ...],
        reason: str,
        row: int,
        gate: Tensor | None,
    ) -> Tensor:
        """Attend over one grid with its text last, (B, H, N, D)."""
        method, density = (Full(), 1.0) if reason else self.choose(video)
        moment, names = self.now.moment, ", ".join(one.name for one in extensions)
        out = computed(
            moment.method(method),
            *(q, k, v),
            video=video,
            scale=scale,
            moment=moment,
            branch=None if reason else self.more.branch(moment.layer),
            extensions=extensions,
            memories=self.memories,
            row=row,
            gate=gate,
        )
        kept = "chosen in each call" if density is None else f"{density:.3f}"
        told = f"dense: {reason}" if reason else f"sparse: {video} tokens, density {kept}"
        self.counts[told + (f", with {names}" if names else "")] += 1
        return out


@dataclass(frozen=True, eq=False)
class Seen:
    """Tokens of a row that a mask leaves.

    Args:
        video: the grid, and as text all tokens beside it that are seen.
        front: how many of these come before it.
        tokens: the places of all tokens that are seen, or None where all are.
    """

    video: VideoShape
    front: int
    tokens: Tensor | None = None


class _Now(threading.local):
    """The forward pass that runs; ComfyUI runs one in a thread of its own on each of several
    GPUs."""

    grid: Grid | None = None
    inside: bool = True
    previous: Callable[..., Tensor] | None = None
    calls: int = 0  # over the grid
    doubles: int = 0  # blocks of the first kind so far
    depth: int = 0  # of our overrides that are asked after this one
    moment: Moment = Moment()
    mask: tuple[Tensor, list[Seen] | None] | None = None
    model: nn.Module | None = None  # that has gates

    def __init__(self) -> None:
        self.hidden: dict[int, Tensor] = {}  # that gates read, by the number of the block


def _seen_through(mask: Tensor, place: Place, batch: int) -> list[Seen] | None:
    """Read from a mask what each row sees; see `SparseAttention._seen`.

    Args:
        mask: (B or 1, 1, N) or (B or 1, 1, 1, N), added to the scores or True for what is seen.
    """
    tokens = place.video.tokens
    if mask.ndim not in (3, 4) or mask.shape[-1] != tokens or mask.numel() != tokens * len(mask):
        return None
    rows = mask.reshape(len(mask), tokens)
    if rows.dtype == torch.bool:
        rows = torch.zeros_like(rows, dtype=torch.float).masked_fill(~rows, HIDDEN)
    shown = rows == 0
    hides = shown | (rows <= HIDDEN)
    video = slice(place.front, place.front + place.video.video_tokens)
    if len(rows) not in (1, batch) or not bool(hides.all() & shown[:, video].all()):
        return None
    if bool((shown == shown[:1]).all()):
        shown = shown[:1]
    return [_seen_in(row, place) for row in shown]


def _seen_in(shown: Tensor, place: Place) -> Seen:
    tokens = shown.nonzero().flatten()
    beside = len(tokens) - place.video.video_tokens
    front = int(shown[: place.front].sum())
    return Seen(VideoShape(*place.video.grid, text=beside), front, tokens)


def _active(options: dict[str, Any], video: VideoShape) -> tuple[Any, ...]:
    """Techniques that change something on a grid that is longer than the model was trained at."""
    return tuple(one for one in options.get(EXTENSIONS, ()) if video.frames > one.trained)


def _behind(previous: Callable[..., Tensor], func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return previous(func, *args, **kwargs)

    return call
