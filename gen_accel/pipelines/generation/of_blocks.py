"""Pipelines that are made of blocks, as pipelines of diffusers that are called like all others.

A modular pipeline of diffusers has no signature, reports no steps, returns its whole state and
offloads no models. `called` makes a class of one that does all this as a `DiffusionPipeline` does.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import chain
from types import MethodType, SimpleNamespace
from typing import Any, cast

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks
from torch import Tensor, nn

from gen_accel.hub import silenced

SCALE = "guidance_scale"  # of the pipeline's guider, which is no input of its blocks
# Arguments of each call besides the inputs of blocks.
OWN = ("output_type", "callback_on_step_end")
StepEnd = Callable[[Any, int, Any, dict[str, Tensor]], object]


class CalledBlocks:
    """Parts of a `DiffusionPipeline` that a modular pipeline lacks; see `called`."""

    _blocks: Any
    components: dict[str, Any]
    guider: Any
    scheduler: Any

    @classmethod
    def of_parts(
        cls, options: Mapping[str, object], parts: Mapping[str, object]
    ) -> DiffusionPipeline:
        """Make the pipeline of parts that are loaded, without those of other workflows.

        Args:
            options: plain values of its index.
        """
        pipe: Any = cls
        with silenced("diffusers"):
            made = pipe(_blocks_of(cls), modular_config_dict=dict(options))
            made.update_components(**parts)
        models = [name for name, one in made.components.items() if isinstance(one, nn.Module)]
        made.model_cpu_offload_seq = "->".join(models)  # as the blocks use them
        return made

    @classmethod
    def needed(cls, inputs: Collection[str]) -> list[str]:
        """Name the parts that are loaded for a call with a prompt and these inputs."""
        given = dict.fromkeys(("prompt", *inputs), True)
        blocks = _blocks_of(cls).get_execution_blocks(**given)
        return [
            one.name
            for one in blocks.expected_components
            if one.default_creation_method == "from_pretrained"
        ]

    def __call__(
        self,
        *,
        output_type: str = "np",
        callback_on_step_end: StepEnd | None = None,
        **given: Any,
    ) -> SimpleNamespace:
        """Run the blocks; those of `decode` are left out for `output_type="latent"`.

        Returns `frames`, (1, F, H, W, 3) in [0, 1] or latents, `audio`, (1, channels, N) in [-1,
        1], and `sampling_rate`, samples a second; None for what the blocks do not make.
        """
        scale, blocks = given.pop(SCALE, None), self._blocks
        with ExitStack() as stack:
            if scale is not None:
                stack.enter_context(_attribute(self, "guider", self.guider.new(**{SCALE: scale})))
            if output_type == "latent":
                kept = {name: one for name, one in blocks.sub_blocks.items() if name != "decode"}
                shorter = type(blocks).from_blocks_dict(kept)
                stack.enter_context(_attribute(self, "_blocks", shorter))
            elif "output_type" in blocks.input_names:
                given["output_type"] = output_type
            if callback_on_step_end is not None:
                stack.enter_context(_reporting(self, callback_on_step_end))
            state = cast(Any, super()).__call__(**given)
        if output_type == "latent":
            return SimpleNamespace(frames=state.get("latents"))
        sound = {name: state.get(name) for name in ("audio", "sampling_rate")}
        return SimpleNamespace(frames=state.get("videos"), **sound)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # a `DiffusionPipeline` would write its config

    def set_progress_bar_config(self, **options: object) -> None:
        for block in _loops(self._blocks):
            block.set_progress_bar_config(**options)


@cache
def called(kind: type[ModularPipeline]) -> type[Any]:
    """Make a class of a modular pipeline, of the same name, that is called as others are.

    Its `__call__` has the inputs of the pipeline's own blocks for a signature, with a
    `guidance_scale` if a guider is among its parts.
    """
    made = type(kind.__name__, (CalledBlocks, kind, DiffusionPipeline), {})

    def call(self: Any, **given: Any) -> SimpleNamespace:
        return CalledBlocks.__call__(self, **given)

    call.__signature__ = _signature(kind)  # pyright: ignore[reportFunctionMemberAccess]
    made.__call__ = call  # pyright: ignore[reportAttributeAccessIssue]
    for axis in ("spatial", "temporal"):
        name = f"vae_scale_factor_{axis}"
        if isinstance(own := getattr(kind, name, None), property):
            setattr(made, name, property(partial(_factor, axis, own)))
    return made


def is_of_blocks(kind: object) -> bool:
    """Whether a class or a pipeline is one that `called` made."""
    return issubclass(kind if isinstance(kind, type) else type(kind), CalledBlocks)


def _blocks_of(kind: type[Any]) -> ModularPipelineBlocks:
    """The blocks that a class of modular pipelines has by default."""
    return getattr(diffusers, kind.default_blocks_name)()


def _signature(kind: type[ModularPipeline]) -> inspect.Signature:
    blocks, place = _blocks_of(kind), inspect.Parameter.POSITIONAL_OR_KEYWORD
    with silenced("diffusers"):  # which says of each guider that it may change
        bare = kind(blocks)  # says defaults that no input has
    found = [inspect.Parameter("self", place)]
    inputs = {one.name: one for one in blocks.inputs if one.name}
    made = {*blocks.intermediate_output_names}  # by blocks, for others that need it
    needed = {n for n, one in inputs.items() if one.required and n not in made}
    needed -= {n for n in needed if _default(n, blocks) is not None}
    for name, one in sorted(inputs.items(), key=lambda pair: pair[0] not in needed):
        default: Any = inspect.Parameter.empty
        if name not in needed:
            default = _default(name, blocks)
            default = getattr(bare, f"default_{name}", None) if default is None else default
        found.append(inspect.Parameter(name, place, default=default, annotation=one.type_hint))
    for name in OWN:
        if name not in inputs:
            found.append(inspect.Parameter(name, place, default=None))
    for part in blocks.expected_components:
        scale = (part.config or {}).get(SCALE) if part.name == "guider" else None
        if scale is not None:
            found.append(inspect.Parameter(SCALE, place, default=scale, annotation=float))
    return inspect.Signature(found)


def _factor(axis: str, own: property, pipe: Any) -> int:
    """Pixels or frames in a latent, as the autoencoder's config says; by the class if it does not,
    which counts stages."""
    config: Any = getattr(getattr(pipe, "vae", None), "config", {})
    said = config.get(f"scale_factor_{axis}")
    assert own.fget is not None
    return own.fget(pipe) if said is None else said


def _default(name: str, block: Any) -> Any:
    """The first default that a block, or one in it, has for an input; None without any."""
    own = (one.default for one in block.inputs if one.name == name)
    inner = (_default(name, one) for one in getattr(block, "sub_blocks", {}).values())
    return next((value for value in chain(own, inner) if value is not None), None)


def _loops(block: Any) -> Iterator[LoopSequentialPipelineBlocks]:
    if isinstance(block, LoopSequentialPipelineBlocks):
        yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _loops(inner)


@contextmanager
def _attribute(of: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(of, name)
    setattr(of, name, value)
    try:
        yield
    finally:
        setattr(of, name, before)


@contextmanager
def _reporting(pipe: Any, tell: StepEnd) -> Iterator[None]:
    """Call `tell` after each step of the scheduler, with its number and the latents. A copy of the
    scheduler, as for sound, reports nothing."""
    scheduler, before, count = pipe.scheduler, pipe.scheduler.step, 0

    def step(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        if self is not scheduler:
            return type(self).step(self, *args, **options)
        made = before(*args, **options)
        tell(pipe, count, args[1], {"latents": made[0]})
        count += 1
        return made

    is_own = "step" in vars(scheduler)
    scheduler.step = MethodType(step, scheduler)
    try:
        yield
    finally:
        if is_own:
            scheduler.step = before
        else:
            del scheduler.step
