"""What a handle says of what ran, and why."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from support.methods import LINEAR, MIXTURE, RADIAL
from support.wan import LAYERS, forward, generate, pipeline, transformer
from torch.utils._python_dispatch import TorchDispatchMode

from gen_accel import Neighborhood, Schedule, SparseLinear, VideoShape, attach
from gen_accel.attention_processors.attached.records import Tally, called, spans
from gen_accel.method import Method
from gen_accel.plan import Plan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch"),
]
STEPS = 4
# None of the demo's sizes; the second has no frame to leave out of a window.
GRID = VideoShape(5, 9, 11)


def test_repr():
    model = transformer()
    handle = attach(model, RADIAL, kernel="gather")
    where = f"{LAYERS} attentions of WanTransformer3DModel"
    assert repr(handle) == f"<Attachment of {RADIAL} to {where}, kernel 'gather'>"
    handle.detach()
    assert repr(handle).endswith("kernel 'gather', detached>")


def test_the_verdict_comes_first():
    pipe = pipeline()
    schedule = Schedule(dense_steps=2, dense_layers=1)
    with attach(pipe, RADIAL, schedule=schedule, kernel="gather") as handle:
        generate(pipe, STEPS)
    summary = handle.summary()
    first, *rest = str(summary).splitlines()
    assert first == summary.verdict() == summary.to_dict()["verdict"]
    more = (
        f"{1 / summary.flops_share:.1f}x less work" if summary.flops_share < 0.95 else "of dense"
    )
    assert more in first
    assert f"{LAYERS - 1} of {LAYERS} layers sparse from step 2" in first
    assert f"density {summary.density:.2f}, kernel gather" in first
    # Layers that did the same share a line, which names the steps.
    assert any(
        "2 x dense (first steps), steps 0-1; 2 x sparse, steps 2-3" in line for line in rest
    )
    assert any(f"4 x dense (dense layer), steps 0-{STEPS - 1}" in line for line in rest)


def test_a_step_is_explained():
    pipe = pipeline()
    schedule = Schedule(dense_start=0.5, dense_layers=1)
    with attach(pipe, RADIAL, schedule=schedule, kernel="gather") as handle:
        assert handle.explain(step=0) == "step 0: nothing ran yet"
        generate(pipe, STEPS)
        density = handle.summary().density
        assert f"step 1, transformer.blocks.0-{LAYERS - 1}: dense (" not in handle.explain(step=1)
        assert "transformer.blocks.0: dense (dense layer)" in handle.explain(step=1)
        assert "dense (first steps)" in handle.explain(step=1, layer=1)
        said = handle.explain(step=3, layer="blocks.1")
        assert said == f"step 3, transformer.blocks.1: sparse, density {density:.3f}, by gather"
        assert handle.explain(step=9) == (
            f"step 9 did not run: the last generation had steps 0-{STEPS - 1}"
        )
        assert len(handle.explain().splitlines()) == 2 * STEPS
        with pytest.raises(ValueError, match=r"one of transformer.blocks.0, .*got 99"):
            handle.explain(layer=99)


def test_nothing_left_out_is_said():
    pipe = pipeline()
    with attach(pipe, Neighborhood((-1, -1, -1)), kernel="gather") as handle:
        generate(pipe, 2)
    assert handle.summary().verdict() == (
        "nothing is left out at this size: density 1, kernel gather"
    )
    assert "nothing is left out at this size, by gather" in handle.explain(step=0)


def test_displaced_processors_are_the_cause():
    pipe = pipeline()
    handle = attach(pipe, RADIAL)
    pipe.transformer.set_attn_processor(handle._sites[0][1].stock)
    with pytest.warns(UserWarning, match="have other processors"):
        generate(pipe, 2)
    said = handle.summary().verdict()
    assert said.startswith(f"nothing of ours ran: all {LAYERS} attentions have other processors")
    assert "WanAttnProcessor" in said
    assert "WanAttnProcessor has taken the place of attach" in handle.explain(step=1, layer=0)


def test_paused_passes_are_the_cause():
    pipe = pipeline()
    with attach(pipe, RADIAL) as handle, handle.paused():
        generate(pipe, 2)
    assert handle.summary().verdict() == (
        "nothing was recorded: all 4 forward passes ran inside paused()"
    )


def test_a_cache_that_skips_blocks_is_the_cause():
    pipe = pipeline()
    with attach(pipe, RADIAL, kernel="gather") as handle:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        generate(pipe, STEPS)
        pipe.transformer.disable_cache()
    last = STEPS - 1
    assert "sparse, density" in handle.explain(step=last, layer=0)
    assert "not called, though its model ran: a cache or a hook skipped this block" in (
        handle.explain(step=last, layer=LAYERS - 1)
    )


def test_dense_without_a_grid_is_recorded():
    """Latents that the patches do not divide run where nothing of the method is asked."""
    model = transformer()
    with attach(model, RADIAL, schedule=Schedule(dense_layers=LAYERS)) as handle:
        handle.passing.clock.tokens = None
        hook = model.register_forward_pre_hook(
            lambda *_: setattr(handle.passing.clock, "tokens", None)
        )
        forward(model)
        hook.remove()
    assert "dense (dense layer, at a grid that is not known)" in handle.explain(step=0, layer=0)


class ByItself(Method):
    def __call__(self, q, k, v, *, video, kernel):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_method_that_computes_by_itself_is_recorded_as_such():
    pipe = pipeline()
    with attach(pipe, ByItself()) as handle:
        generate(pipe, 2)
    assert "kernel its own code, without a kernel" in handle.summary().verdict()
    assert "what it leaves out is not known" in handle.explain(step=0, layer=0)


@pytest.mark.slow
def test_one_graph_is_the_cause():
    torch._dynamo.reset()
    model = transformer()
    with attach(model, RADIAL) as handle:
        model.compile(backend="eager", fullgraph=True)
        forward(model)
    torch._dynamo.reset()
    assert handle.summary().verdict() == (
        "nothing was recorded: the model is one graph, which tells no step apart"
    )


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(method, record):
    model = transformer()
    with attach(model, method, record=record) as handle, torch.no_grad():
        forward(model)  # what the grid decides is made once
        with Operations() as counted:
            forward(model)
        assert bool(handle.records) == record
        if not record:
            assert handle.summary().verdict() == "nothing was recorded, as record=False says"
    return counted.count


@pytest.mark.parametrize("method", [RADIAL, MIXTURE, LINEAR], ids=str)
def test_recording_costs_two_operations_a_call(method):
    calls = LAYERS
    assert operations(method, record=True) - operations(method, record=False) <= 2 * calls


def counted(*plans):
    tally = Tally(plans[0])
    for plan in plans:
        tally.add(plan)
    return tally.shares()


@pytest.mark.parametrize("method", [MIXTURE, LINEAR], ids=str)
def test_counts_agree_with_the_plan(method):
    """Exactly without a route; within a few per cent with one, whose groups differ in size."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, GRID.tokens, 16, generator=generator) for _ in "qk")
    plan = method.plan_for(q, k, video=GRID)
    kept, computed = (x.item() for x in plan.densities())
    found = counted(plan)
    near = 1e-5 if plan.partial is None else 0.2
    assert counted(plan, plan, plan, plan) == pytest.approx([4 * share for share in found])
    assert found[0] == pytest.approx(kept, rel=near)
    assert found[1] == pytest.approx(computed, rel=near)


def test_counts_of_a_plan_with_padding():
    slots = torch.tensor([*range(7), -1, *range(7, 10), -1])
    keep = torch.tensor([[[[True, False, True], [False, True, False], [True, True, True]]]])
    plan = Plan(slots, keep, 4, 4, dynamic=True)
    kept, computed = (x.item() for x in plan.densities())
    assert counted(plan) == pytest.approx((kept, computed))
    twice = tuple(2 * share for share in (kept, computed))
    assert counted(plan, plan) == pytest.approx(twice)


def test_counts_of_grids_of_as_many_tokens():
    """In turns, with as many blocks that hold others, and with more blocks."""
    q, k = (torch.randn(1, 2, 120, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    method = SparseLinear(critical=0.3, block_q=8, block_k=8)
    grids = [VideoShape(2, 6, 10), VideoShape(3, 5, 8), VideoShape(5, 3, 7, text=15)]
    plans = [method.plan_for(q, k, video=grid) for grid in grids * 2]
    assert len({plan.keep.shape for plan in plans}) > 1
    exact = torch.tensor([[x.item() for x in plan.densities()] for plan in plans]).sum(0)
    assert counted(*plans) == pytest.approx(tuple(exact.tolist()))


@pytest.mark.slow
def test_counts_do_not_pile_up():
    """On a transformer alone, records go on for as long as it is attached."""
    model = transformer()
    with attach(model, MIXTURE) as handle, torch.no_grad():
        for _ in range(70):
            forward(model)
        assert all(len(record._tallies) == 1 for record in handle.records.values())
        assert all(record.calls == 70 for record in handle.records.values())
        assert 0 < handle.summary().density < 1


def test_seconds_need_records():
    with pytest.raises(ValueError, match="timed=True writes seconds into the records"):
        attach(transformer(), RADIAL, timed=True, record=False)


def test_without_records_nothing_is_guessed():
    pipe = pipeline()
    with attach(pipe, RADIAL, schedule=Schedule(dense_steps=1), record=False) as handle:
        generate(pipe, 2)
    assert handle.explain(step=1).endswith("nothing was recorded, as record=False says")


def test_another_attachment_takes_one_transformer_over():
    """The first one's hooks go with its last attention there."""
    first, second = transformer(), transformer()
    both = attach(first, RADIAL, schedule=Schedule(dense_steps=1))
    hooks = len(first._forward_pre_hooks)
    attach(first, MIXTURE)
    assert len(first._forward_pre_hooks) == hooks
    assert not both.is_attached
    assert "0 attentions" in repr(both)
    forward(first)
    forward(second)


def test_names_are_drawn_together():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    names = [f"transformer.blocks.{i}" for i in range(4)] + ["unet.mid.attn"]
    assert called(names) == "unet.mid.attn, transformer.blocks.0-3"
    assert called(["t.down.0.attn", "t.down.2.attn"]) == "t.down.0, 2.attn"
