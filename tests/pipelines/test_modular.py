"""Sparse attention in modular pipelines of diffusers, by `attach` and by blocks."""

import json

import pytest
import torch
from diffusers import ComponentsManager, ModularPipeline, WanBlocks, WanModularPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from support import wan

from gen_accel import Dense, Neighborhood, Radial, Schedule, attach, demo
from gen_accel.attention_processors.attached.attachment import attachments_of
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.modular import GenAccelBlock, GenAccelSummaryBlock

STEPS, FRAMES, SIDE = 4, 9, 64
COMPONENTS = ("transformer", "scheduler", "text_encoder", "tokenizer", "vae")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def parts():
    """Return the components of the embedded model."""
    pipe = load(demo.path(), Loading(dtype="float32", device="cpu"))
    return {name: getattr(pipe, name) for name in COMPONENTS}


def made(blocks, parts):
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(parts):
    return made(WanBlocks(), parts)


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe)


def run(pipe, *, output="latents", **options):
    given = {
        "prompt": "a red circle moves right",
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(5),
    }
    return pipe(**(given | options), output=output)


def test_a_modular_pipeline_is_one_of_the_demo_model(pipe):
    assert isinstance(pipe, WanModularPipeline)


def test_dense_is_the_models_own_and_all_that_is_kept_is_dense(pipe, stock):
    before = wan.processors(pipe)
    with attach(pipe, Dense()):
        assert torch.equal(run(pipe), stock)
    with attach(pipe, Neighborhood((-1, -1, -1))) as handle:
        out = run(pipe)
        assert handle.summary().density == 1
    assert (out - stock).abs().max() < 1e-3
    assert wan.processors(pipe) == before


def test_two_steps_stay_dense_and_detaching_restores(pipe, stock):
    with attach(pipe, Radial(block=16), schedule=Schedule(dense_steps=2)) as handle:
        out = run(pipe)
        records = handle.summary().records
    layers = len(pipe.transformer.blocks)
    assert len(records) == STEPS * layers
    for (_, step), record in records.items():
        assert record.calls == 2  # of guidance
        assert record.why_dense == ("first steps" if step < 2 else None)
    assert not torch.allclose(out, stock, atol=1e-3)
    assert torch.equal(run(pipe), stock)


def test_shares_of_the_steps_are_known(pipe):
    with attach(pipe, Radial(block=16), schedule=Schedule(dense_start=0.3)) as handle:
        run(pipe)
        records = handle.summary().records
    dense = {step for (_, step), record in records.items() if record.why_dense}
    assert dense == {1, 2}


@pytest.fixture(scope="module")
def with_blocks(parts):
    blocks = WanBlocks()
    blocks.sub_blocks.insert("sparse_attention", GenAccelBlock(), 0)
    blocks.sub_blocks["attention_summary"] = GenAccelSummaryBlock()
    return made(blocks, parts)


def test_blocks_attach_by_their_inputs_and_take_it_off(with_blocks, pipe, stock):
    options = {"attention_method": "radial", "attention_settings": "block=16", "dense_start": 0.3}
    state = run(with_blocks, output=None, **options)
    with attach(pipe, Radial(block=16), schedule=Schedule(dense_start=0.3)) as handle:
        assert torch.equal(run(pipe), state.get("latents"))
        assert str(handle.summary()).split("\n")[0] in state.get("attention_summary")
    assert state.get("attached_attention").startswith("Radial(")
    assert attachments_of(with_blocks) == []
    assert torch.equal(run(with_blocks, attention_method="none"), stock)


def test_what_is_kept_on_the_model_is_replaced_by_the_next_run(with_blocks, stock):
    options = {"attention_settings": ["block=16"], "keep_attention": True}
    run(with_blocks, attention_method="radial", dense_layers=[0], **options)
    [handle] = attachments_of(with_blocks)
    assert handle.schedule == Schedule(dense_layers=(0,), dense_start=0.2)
    assert torch.equal(run(with_blocks, attention_method="none"), stock)
    assert attachments_of(with_blocks) == []
    assert not handle.is_attached


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_method": "radail"}, "did you mean 'radial'"),
        ({"attention_settings": "critical"}, "field=value, got 'critical'"),
        ({"dense_start": 2.0}, "share of the steps"),
        ({"attention_kernel": "fastest"}, "kernel must be"),
    ],
)
def test_inputs_that_cannot_be_are_refused_in_a_line(with_blocks, options, reason):
    with pytest.raises(ValueError, match=reason):
        run(with_blocks, **options)
    assert attachments_of(with_blocks) == []


def test_a_node_of_its_own_serves_the_model_of_another(parts, stock):
    """Share components, as nodes of Mellon do, which are pipelines."""
    manager = ComponentsManager()
    node = GenAccelBlock(("transformer", "scheduler")).init_pipeline(components_manager=manager)
    node.update_components(transformer=parts["transformer"], scheduler=parts["scheduler"])
    told = node(attention_method="radial", attention_settings="block=16", dense_steps=2,
                output="attached_attention")  # fmt: skip
    assert told.startswith("Radial(")
    other = made(WanBlocks(), parts)
    out = run(other)
    [handle] = attachments_of(other)
    steps = {step for (_, step), one in handle.summary().records.items() if one.why_dense}
    assert steps == {0, 1}
    node(attention_method="none")
    assert not torch.allclose(out, stock, atol=1e-3)
    assert torch.equal(run(other), stock)


def test_mellon_makes_a_node_of_it(tmp_path):
    """Load a folder as on the Hub, with the two files that docs/modular.md shows."""
    (tmp_path / "block.py").write_text(
        "from gen_accel.pipelines.modular import GenAccelBlock\n\n\n"
        "class SparseAttention(GenAccelBlock):\n"
        "    def __init__(self):\n"
        '        super().__init__(("transformer", "scheduler"))\n'
    )
    about = {"_class_name": "SparseAttention"}
    about["auto_map"] = {"ModularPipelineBlocks": "block.SparseAttention"}
    (tmp_path / "modular_config.json").write_text(json.dumps(about))
    block = ModularPipelineBlocks.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert isinstance(block, GenAccelBlock)
    assert isinstance(block.init_pipeline(), ModularPipeline)
    fields = MellonPipelineConfig.from_custom_block(block).to_dict()["node_params"]["custom"]
    fields = fields["params"]
    assert {"attention_method", "dense_start", "transformer", "scheduler"} <= set(fields)
    assert fields["attention_method"]["default"] == "piecewise"
