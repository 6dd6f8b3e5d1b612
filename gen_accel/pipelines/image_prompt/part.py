"""One model of a pipeline, with the branches that an image prompt adds to it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from gen_accel.attention_processors.families import (
    Family,
    ImageAttention,
    argument_names,
)
from gen_accel.attention_processors.image_prompt import ImageAdapter, warn_of_other_text
from gen_accel.attention_processors.lengths import temporal_patch
from gen_accel.pipelines.image_prompt.branch import (
    Branch,
    ImageTerm,
    Turns,
    Watched,
)
from gen_accel.pipelines.image_prompt.guidance import (
    Calls,
    GuidanceMode,
)
from gen_accel.pipelines.image_prompt.strength import (
    temporal_factor,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class AdapterTarget:
    """One model of a pipeline.

    Attributes:
        attentions: number of attentions that an image prompt could act in.
        how: how the model's pipelines run the negative prompt.
        unet: the model attends over several grids, each smaller than the one before.
        moving: the model makes videos.
        apart: each frame is a row of its own in the attentions.
        factor: pixel frames in a latent frame, see `temporal_factor`.
        first_alone: the first latent frame holds one pixel frame.
        patch: latent frames in a token.
        names: of the arguments of a forward pass.
        taps: taps of the branches, which `undo` takes off.
    """

    def __init__(
        self,
        name: str,
        model: "ModelMixin",
        family: Family,
        pipe: "DiffusionPipeline | None",
        adapter: ImageAdapter,
    ) -> None:
        sites = family.image_attentions(model)
        _check(adapter, sites, model)
        warn_of_other_text(adapter, sites)
        self.name, self.kind, self.attentions = name, type(model).__name__, len(sites)
        self.branches = [Branch(site) for site in sites if site.number in adapter.layers]
        self.family, self.names = family, argument_names(type(model))
        own = family.image_prompts
        named = hasattr(model, "cache_context") and own.names_calls
        self.how = GuidanceMode(own.guidance == "batched", named, own.guided)
        self.unet = hasattr(model, "down_blocks")
        self.moving, self.apart = family.kind != "image", family.kind == "frames"
        self.first_alone = family.sizes.first_alone
        self.factor = temporal_factor(pipe, model, family)
        self.patch = 1 if self.factor is None else temporal_patch(model)
        self.calls, self.turns, self.watched = Calls(), Turns(), Watched(())
        self.undo: list[Callable[[], None]] = []
        self.taps: list[Any] = []

    def put_on(self, model: "ModelMixin", name: str, prepare: Callable[..., None]) -> None:
        """Add the branches to the attentions, and call `prepare` before each forward pass."""
        child = child_name(name)
        model.add_module(child, self.calls)
        self.undo.append(partial(_drop, model, child))
        _renew(model)
        for branch in self.branches:
            tap = self.family.tap_image(model, branch.site, branch)
            self.taps.append(tap)
            self.undo.append(tap)
        self.undo.append(model.register_forward_pre_hook(prepare, with_kwargs=True).remove)

    def take_off(self) -> None:
        """Restore the model. Does nothing the second time."""
        while self.undo:
            self.undo.pop()()
        for branch in self.branches:
            branch.clear()
        self.turns.forget()
        self.taps.clear()

    def check_taps(self) -> None:
        """Raise ValueError if an attention's tap was replaced by another processor."""
        for branch, tap in zip(self.branches, self.taps, strict=True):
            if not tap.is_on:
                raise ValueError(
                    f"the processor of {branch.site.name} was replaced after the image prompt "
                    "was loaded, which no longer acts there: remove() it, set processors, slicing "
                    "or fused projections first, then load it again"
                )

    def fill(self, terms: Sequence[tuple[ImageTerm, ...]]) -> None:
        for branch, own in zip(self.branches, terms, strict=True):
            branch.fill(own, self.turns.now)


def child_name(name: str) -> str:
    """Name of the model's child module that marks an image prompt of this name."""
    return f"image_prompt_{name}"


def _check(adapter: ImageAdapter, sites: Sequence[ImageAttention], model: nn.Module) -> None:
    """Raise ValueError for an adapter of another model."""
    kind, by_number = type(model).__name__, {site.number: site for site in sites}
    strange = [number for number in adapter.layers if number not in by_number]
    if strange:
        raise ValueError(
            f"the adapter is for another model: it has layers for attentions "
            f"{', '.join(strange)}, {kind} has {', '.join(by_number)}"
        )
    width = adapter.projector.width
    for number, layer in adapter.layers.items():
        site = by_number[number]
        inner = site.heads * site.dim
        for name in ("to_k", "to_v"):
            module: Any = layer.get_submodule(name)
            sizes = module.in_features, module.out_features
            if sizes != (width, inner):
                raise ValueError(
                    f"the adapter is for another model: {name} of its layer {number} takes "
                    f"{sizes[0]} to {sizes[1]}, the projector makes {width} and {site.name} of "
                    f"{kind} has {inner}"
                )
        if adapter.start is not None and site.width != width:
            raise ValueError(
                f"the adapter is for another model: it starts from {site.name} of {kind}, which "
                f"takes {site.width}, and its projector makes {width}"
            )


def _drop(model: nn.Module, child: str) -> None:
    if hasattr(model, child):
        delattr(model, child)
    _renew(model)


def _renew(model: nn.Module) -> None:
    """Clear diffusers' cache of the children that have hooks."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry._child_registries_cache = None
