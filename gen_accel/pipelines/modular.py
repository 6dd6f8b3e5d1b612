"""Blocks for modular pipelines of diffusers: one attaches a method, another one tells what ran.

    blocks = WanBlocks()
    blocks.sub_blocks.insert("sparse_attention", GenAccelBlock(), 0)
    blocks.sub_blocks["attention_summary"] = GenAccelSummaryBlock()
    pipe = blocks.init_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    pipe.load_components()
    pipe(prompt="a cat surfs", attention_method="piecewise", dense_start=0.2)

The inputs are words and numbers, so that a node of Mellon has a field for each.
"""

from collections.abc import Sequence
from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import (
    ComponentSpec,
    InputParam,
    OutputParam,
)

from gen_accel.attention_processors.attached.attachment import attachments_of
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.pipelines.attach import attach

NONE = "none"  # in the place of a method: nothing is attached


class _AttentionBlock(ModularPipelineBlocks):
    """A block that reads the pipeline's transformers.

    Args:
        components: names of components that a pipeline of this block alone has to have, such as
            ("transformer", "scheduler"), as a node of Mellon is. Among other blocks the pipeline
            has them already.
    """

    def __init__(self, components: Sequence[str] = ()) -> None:
        super().__init__()
        self._components = tuple(components)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name) for name in self._components]


class GenAccelBlock(_AttentionBlock):
    """Attaches a method to the transformers of the pipeline, for this run and the following ones.

    It stands before the denoising. Each run attaches by its own inputs, the arguments of
    `gen_accel.attach`. `attention_method="none"` takes the method off, and the model
    is bit-identical to before.
    """

    @property
    def description(self) -> str:
        return "Makes the transformer's self-attention sparse, by a method of gen_accel."

    @property
    def inputs(self) -> list[InputParam]:
        """The method, as `--method` and `--set` of the command line, the kernel and the steps and
        layers that stay dense."""
        return [
            _input("attention_method", str, "piecewise", "textbox", 'a method, or "none"'),
            _input(
                "attention_settings",
                list,
                None,
                "textbox",
                'options of the method, "critical=0.2 tile=4,4,4" or a list of such',
            ),
            _input("attention_kernel", str, "auto", "textbox", 'a kernel, or "auto"'),
            _input(
                "dense_start",
                float,
                0.2,
                "slider",
                "share of steps, from the second on, kept dense",
            ),
            _input("dense_end", float, 0.0, "slider", "last share of the steps kept dense"),
            _input("dense_steps", int, 0, "number", "number of first steps kept dense"),
            _input(
                "dense_layers", int, 0, "number", "first blocks kept dense, or a list of numbers"
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [_text_output("attached_attention", "the attached method and schedule")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given: Any = self.get_block_state(state)
        settings = given.attention_settings or ()
        settings = settings.split() if isinstance(settings, str) else list(settings)
        if given.attention_method == NONE:
            for handle in attachments_of(components):
                handle.detach()
            given.attached_attention = NONE
        else:
            method = method_from(given.attention_method, settings)
            layers = given.dense_layers
            schedule = Schedule(
                dense_layers=tuple(layers) if isinstance(layers, list) else layers,
                dense_steps=given.dense_steps,
                dense_start=given.dense_start,
                dense_end=given.dense_end,
            )
            attach(components, method, schedule=schedule, kernel=given.attention_kernel)
            given.attached_attention = f"{method}, {schedule}"
        self.set_block_state(state, given)
        return components, state


class GenAccelSummaryBlock(_AttentionBlock):
    """Tells what ran in this run, and detaches unless `keep_attention` is set. It stands behind
    the denoising."""

    @property
    def description(self) -> str:
        return "Tells which layers and steps were sparse, and takes sparse attention off."

    @property
    def inputs(self) -> list[InputParam]:
        told = "leave the method on the transformer"
        return [_input("keep_attention", bool, False, "checkbox", told)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        told = '`summary()` of the attached method; "" without one'
        return [_text_output("attention_summary", told)]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given: Any = self.get_block_state(state)
        handles = attachments_of(components)
        given.attention_summary = "\n".join(str(handle.summary()) for handle in handles)
        if not given.keep_attention:
            for handle in handles:
                handle.detach()
        self.set_block_state(state, given)
        return components, state


def _input(name: str, kind: type, default: object, field: str, told: str) -> InputParam:
    """Describe one input; `field` is what a node of Mellon shows for it."""
    return InputParam(
        name, type_hint=kind, default=default, description=told, metadata={"mellon": field}
    )


def _text_output(name: str, told: str) -> OutputParam:
    return OutputParam(name, type_hint=str, description=told, metadata={"mellon": "text"})
