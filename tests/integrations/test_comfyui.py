"""The ComfyUI node, against a small stand-in of what it uses of ComfyUI."""

import sys
from functools import partial

import pytest
import torch
from support.comfyui_host import (
    BLOCKS,
    HEADS,
    OVERRIDE,
    WIDTH,
    Executor,
    Patcher,
    WanModel,
    latents,
    optimized_attention,
)

import gen_accel
from gen_accel import Radial, SparseLinear, VideoShape

GRID = VideoShape(5, 8, 8)


@pytest.fixture
def node(pack):
    kind = pack.NODE_CLASS_MAPPINGS["GenAccelSparseAttention"]

    def put(patcher, **inputs):
        given = {"method": "sparse_linear", "keep_percent": 30.0, "min_tokens": 0}
        given |= {"start_percent": 0.0, "end_percent": 1.0}
        [patched] = getattr(kind(), kind.FUNCTION)(patcher, **(given | inputs))
        return patched

    return put


def expected(x, video, method, sparse_blocks=range(BLOCKS)):
    """The same model with our attention called by hand in its self-attention."""
    model = WanModel()

    def by_hand(q, k, v, *, transformer_options, mask=None):
        if q.shape != k.shape or transformer_options["block_index"] not in sparse_blocks:
            return optimized_attention(q, k, v, HEADS)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        out = gen_accel.attention(q, k, v, video=video, method=method)
        return out.transpose(1, 2).flatten(2)

    model.attention = by_hand
    return Patcher(model).forward(x)


def test_the_first_inputs_keep_their_places(pack):
    """Saved workflows hold values by place; old ones were made when there were no others."""
    kind = pack.NODE_CLASS_MAPPINGS["GenAccelSparseAttention"]
    inputs = kind.INPUT_TYPES()
    names = [*inputs["required"], *inputs["optional"]]
    own = ["keep_percent", "start_percent", "end_percent", "dense_blocks", "min_tokens"]
    assert names[:7] == ["model", "method", *own]  # as in ComfyUI's own node
    assert {"sparse_linear", "radial"} <= {*inputs["required"]["method"][0]}
    assert kind.RETURN_TYPES == ("MODEL",)
    assert "comfy" not in sys.modules


@pytest.mark.parametrize(
    ("size", "video"),
    [((5, 16, 16), GRID), ((3, 9, 14), VideoShape(3, 5, 7))],
    ids=["even", "padded"],
)
def test_self_attention_is_ours_over_the_grid_of_the_latents(node, size, video):
    x = latents(*size, batch=2)
    model = Patcher(WanModel())
    patched = node(model, method="sparse_linear", keep_percent=30.0)
    exact = expected(x, video, SparseLinear(critical=0.3))
    assert torch.allclose(patched.forward(x), exact, atol=1e-5)
    assert not torch.allclose(model.forward(x), exact, atol=1e-3)  # which stayed as it was


@pytest.mark.slow
def test_everything_kept_is_the_dense_model(node):
    x, model = latents(batch=2), Patcher(WanModel())
    for method in ("sparse_linear", "radial"):
        patched = node(model, method=method, keep_percent=100.0)
        assert torch.allclose(patched.forward(x), model.forward(x), atol=1e-5)


def test_a_copy_of_the_patched_model_is_patched(node):
    x, patched = latents(batch=2), node(Patcher(WanModel()))
    twin = patched.clone()
    assert torch.equal(twin.forward(x), patched.forward(x))
    exact = expected(x, GRID, SparseLinear(critical=0.3))
    assert torch.allclose(twin.forward(x), exact, atol=1e-5)


def test_the_grid_may_change_from_call_to_call(node):
    patched = node(Patcher(WanModel()))
    for frames in (5, 3, 5):
        x = latents(frames, batch=2)
        exact = expected(x, VideoShape(frames, 8, 8), SparseLinear(critical=0.3))
        assert torch.allclose(patched.forward(x), exact, atol=1e-5)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_radial_is_the_widest_that_keeps_no_more(pack, keep):
    video = VideoShape(13, 16, 16)
    method, density = pack.methods.Asked("radial", keep)(video)
    assert density == method.density(video)
    wider = Radial(decay_factor=1.01 * method.decay_factor)
    assert density <= keep < wider.density(video)


def test_radial_that_cannot_be_that_sparse_is_the_sparsest(pack):
    method, density = pack.methods.Asked("radial", 0.01)(GRID)
    assert density == method.density(GRID) == Radial(decay_factor=1e-6).density(GRID) > 0.01


def test_dense_blocks_stay_dense(node):
    x, method = latents(batch=2), SparseLinear(critical=0.3)
    patched = node(Patcher(WanModel()), dense_blocks="0, 2-7")
    assert torch.allclose(patched.forward(x), expected(x, GRID, method, {1}), atol=1e-5)


@pytest.mark.parametrize(
    ("sigma", "is_sparse"), [(0.9, False), (0.75, True), (0.5, True), (0.25, False)]
)
def test_start_and_end_are_shares_of_the_sampling(node, sigma, is_sparse):
    x, model = latents(batch=2), Patcher(WanModel())
    patched = node(model, start_percent=0.2, end_percent=0.7)
    dense = torch.equal(patched.forward(x, sigma), model.forward(x, sigma))
    assert dense is not is_sparse


def test_text_beside_the_video_stays_dense(node, caplog):
    x, model = latents(batch=2), Patcher(WanModel(behind=3))
    patched = node(model)
    assert torch.equal(patched.forward(x), model.forward(x))
    assert any("dense: 323 tokens, the grid has 5 x 8 x 8" in s for s in patched.clean_up(caplog))


def test_a_mask_stays_dense(node, caplog):
    x, model = latents(batch=2), Patcher(WanModel())
    mask = torch.zeros(GRID.tokens, GRID.tokens)
    mask[:, :9] = -torch.inf
    patched = node(model)
    assert torch.equal(patched.forward(x, mask=mask), model.forward(x, mask=mask))
    assert any("dense: a mask" in line for line in patched.clean_up(caplog))


def test_few_tokens_stay_dense(node):
    x, model = latents(batch=2), Patcher(WanModel())
    assert torch.equal(node(model, min_tokens=321).forward(x), model.forward(x))
    assert not torch.equal(node(model, min_tokens=320).forward(x), model.forward(x))


def test_the_log_counts_what_ran_and_begins_anew(node, caplog):
    patched = node(Patcher(WanModel()), dense_blocks="0")
    for _ in range(2):
        patched.forward(latents(batch=2))
    told = patched.clean_up(caplog)
    start = "Sparse Attention (gen_accel): "
    assert sorted(told) == [
        f"{start}2 attention calls dense: dense_blocks",
        f"{start}4 attention calls sparse: 5 x 8 x 8 tokens, density 0.300",
        f"{start}6 attention calls dense: cross-attention, or fewer heads of keys",
    ]
    assert "no attention call came by" in patched.clean_up(caplog)[0]


def test_an_error_leaves_nothing_behind(node):
    model, x = Patcher(WanModel()), latents(batch=2)
    patched = node(model)
    options = {"sigmas": torch.tensor([0.5])}
    [wrapper] = [one for these in patched.wrappers.values() for one in these]
    call = Executor(patched.model.apply_model, patched.model, [wrapper])
    with pytest.raises(RuntimeError):
        call(x, torch.tensor([0.5]), None, torch.ones(2, 6, WIDTH + 1), None, options)
    assert OVERRIDE not in options
    assert torch.equal(model.forward(x), Patcher(WanModel()).forward(x))


def test_what_stays_dense_goes_to_the_override_that_was_there(node):
    model, seen = Patcher(WanModel()), []

    def other(func, *args, **kwargs):
        seen.append(kwargs["transformer_options"]["block_index"])
        return func(*args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = other
    node(model, dense_blocks="1").forward(latents(batch=2))
    assert seen == [0, 1, 1, 2]  # cross-attention everywhere, and one block whole


def test_layouts_and_scale_are_those_of_the_call(node):
    patched = node(Patcher(WanModel()))
    q, k, v = torch.randn(3, 2, HEADS, GRID.tokens, 16)
    exact = gen_accel.attention(q, k, v, video=GRID, method=SparseLinear(critical=0.3), scale=0.5)

    def attend(x, timestep, context, control, transformer_options):
        flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
        options = {"transformer_options": transformer_options, "scale": 0.5}
        call = partial(optimized_attention, heads=HEADS, **options)
        return (
            call(*flat).unflatten(2, (HEADS, -1)).transpose(1, 2),
            call(*flat, skip_output_reshape=True),
            call(q, k, v, skip_reshape=True).unflatten(2, (HEADS, -1)).transpose(1, 2),
            call(q, k, v, skip_reshape=True, skip_output_reshape=True),
        )

    patched.model.diffusion_model = attend
    for out in patched.forward(latents(batch=2)):
        assert torch.allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", set()), ("0, 1, 47-49", {0, 1, 47, 48, 49}), ("3 - 5 7", {3, 4, 5, 7}), ("2,", {2})],
)
def test_numbers_of_blocks(pack, text, numbers):
    assert pack.nodes.block_numbers(text) == numbers


def test_numbers_of_blocks_that_are_none(node):
    with pytest.raises(ValueError, match=r"dense_blocks .* 'first'"):
        node(Patcher(WanModel()), dense_blocks="first")
