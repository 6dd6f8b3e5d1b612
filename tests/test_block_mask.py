"""FlexAttention's masks by our kernels: output and gradients of compiled FlexAttention."""

import gc
from weakref import ref

import pytest
import torch
from support.checks import assert_no_worse
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.attention.flex_attention import create_block_mask as torchs
from torch.nn.attention.flex_attention import flex_attention as torchs_attention

from gen_accel import flex_attention
from gen_accel.block_mask import create_block_mask, plans
from gen_accel.plan import Windows

N = 300  # no block divides it
DOCUMENT = torch.arange(N) // 110
FRAME = torch.arange(N) // 37
IMAGE = torch.full((N,), -1)
IMAGE[40:120], IMAGE[200:] = 0, 1
VALID = torch.rand(2, N, generator=torch.Generator().manual_seed(0)) > 0.2
NOISE = torch.rand(N, N, generator=torch.Generator().manual_seed(1)) > 0.5


def causal(b, h, q, k):
    return q >= k


def documents(b, h, q, k):
    return (DOCUMENT[q] == DOCUMENT[k]) & (q >= k)


def chunks(b, h, q, k):
    """Of AnyFlow: causal by chunk, none sees the second of its own."""
    return (FRAME[q] >= FRAME[k]) & ~((FRAME[q] == FRAME[k]) & (k % 2 == 1))


def prompts(b, h, q, k):
    """Of Qwen-Image 2.1: causal, images both ways, padding by sample."""
    return ((q >= k) | ((IMAGE[q] == IMAGE[k]) & (IMAGE[q] >= 0))) & VALID[b, k]


def boxes(frames, rows, columns, window):
    """Of LTX-2's decoder: windows that are shifted at the border."""

    def rule(b, h, q, k):
        seen = q >= 0
        steps = rows * columns, columns, 1
        for step, size, wide in zip(steps, (frames, rows, columns), window, strict=True):
            first = torch.clamp(q // step % size - wide // 2, 0, size - wide)
            place = k // step % size
            seen = seen & (place >= first) & (place < first + wide)
        return seen

    return rule


def by_head(b, h, q, k):
    return (q - k).abs() < 10 * (h + 1)


def blind(b, h, q, k):
    return (q >= k) & (q % 3 != 0)


def noise(b, h, q, k):
    return NOISE[q, k]


# Mask function, samples, heads, tokens of q and k, and what its plans are.
MASKS = {
    "causal": (causal, None, None, N, N, "windows"),
    "documents": (documents, None, None, N, N, "windows"),
    "chunks": (chunks, None, None, N, N, "blocks"),
    "prompts": (prompts, 2, None, N, N, "windows"),
    "box": (boxes(5, 6, 10, (3, 3, 5)), None, None, N, N, "windows"),
    "plane": (boxes(1, 20, 15, (1, 5, 7)), None, None, N, N, "windows"),
    "by head": (by_head, None, 3, N, N, "windows"),
    "blind queries": (blind, None, None, N, N, "windows"),
    "nothing": (lambda b, h, q, k: (q < 0) & (k < 0), None, None, N, N, "blocks"),
    "all": (lambda b, h, q, k: (q >= 0) & (k >= 0), None, None, N, N, "blocks"),
    "fewer queries": (lambda b, h, q, k: q + 90 >= k, None, None, 200, N, "windows"),
    "fewer keys": (lambda b, h, q, k: q >= k + 20, None, None, N, 200, "windows"),
    "noise": (noise, None, None, N, N, "neither"),
}


def qkv(Nq=N, Nk=N, dtype=torch.float32, heads=3):
    g = torch.Generator().manual_seed(2)
    sizes = Nq, Nk, Nk
    return [torch.randn(2, heads, n, 8, generator=g, dtype=torch.float64).to(dtype) for n in sizes]


def dense(q, k, v, seen, scale=8**-0.5):
    """softmax(q k^T) v over what is seen, written out."""
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    some = seen.any(-1, keepdim=True)
    return scores.masked_fill(~some, 0.0).softmax(-1).where(some, 0.0) @ v


def with_gradients(attend, q, k, v):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def held(mask, seen, q, k, v, **options):
    """Output and gradients are within the budget that dense attention sets."""
    exact = with_gradients(lambda *x: dense(*x, seen), *(x.double() for x in (q, k, v)))
    low = with_gradients(lambda *x: dense(*x, seen), q, k, v)
    ours = with_gradients(lambda *x: flex_attention(*x, mask, **options), q, k, v)
    for one, by_dense, right in zip(ours, low, exact, strict=True):
        assert_no_worse(one, by_dense, right)


@pytest.mark.parametrize("blocks", [128, (64, 32)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_computed_as_dense_attention(name, blocks):
    rule, B, H, Nq, Nk, kind = MASKS[name]
    mask = torchs(rule, B, H, Nq, Nk, device="cpu", BLOCK_SIZE=blocks)
    found = plans(mask, 2, 3, Nq, Nk)
    if kind == "neither":
        assert all(part.plan is None for part in found)
    else:
        assert all(isinstance(part.plan.partial, Windows) == (kind == "windows") for part in found)
        seen = create_mask(rule, B, H, Nq, Nk, device="cpu").double().mean().item()
        share = sum(part.plan.density for part in found) / len(found)
        assert share * max(Nq, Nk) ** 2 == pytest.approx(seen * Nq * Nk, rel=1e-6)
    held(mask, create_mask(rule, B, H, Nq, Nk, device="cpu"), *qkv(Nq, Nk))


@pytest.mark.parametrize("kernel", ["reference", "gather", "native"])
@pytest.mark.parametrize("name", ["prompts", "chunks", "box", "fewer queries"])
def test_any_kernel_runs_them(name, kernel):
    rule, B, H, Nq, Nk, _ = MASKS[name]
    mask = torchs(rule, B, H, Nq, Nk, device="cpu")
    ran = []
    seen = create_mask(rule, B, H, Nq, Nk, device="cpu")
    held(mask, seen, *qkv(Nq, Nk), kernel=kernel, report=ran.append)
    assert {choice.kernel for choice in ran} == {kernel}


def listed():
    """Lists of blocks without a mask function, and the blocks that they keep."""
    keep = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[0, 0, 1] = False
    count, index = keep.sum(-1).int(), keep.int().argsort(-1, descending=True).int()
    lists = torch.zeros_like(count), index, count, index
    return keep, BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=64)


def test_lists_without_a_mask_function_leave_blocks_out():
    """As NABLA's, of which uncompiled FlexAttention leaves out nothing."""
    keep, mask = listed()
    seen = keep.repeat_interleave(64, -1).repeat_interleave(64, -2)
    held(mask, seen, *qkv(256, 256))


@pytest.mark.nightly
def test_compiled_flex_attention_agrees():
    q, k, v = qkv(256, 256)
    compiled = torch.compile(torchs_attention, dynamic=False)
    bare = listed()[1]
    # On a CPU torch 2.13 makes C++ that does not build of lists that are one tensor.
    apart = BlockMask.from_kv_blocks(
        bare.kv_num_blocks,
        bare.kv_indices,
        bare.full_kv_num_blocks,
        bare.full_kv_indices.clone(),
        BLOCK_SIZE=64,
    )
    causes = torchs(causal, None, None, 256, 256, device="cpu")
    for mask, same in ((bare, apart), (causes, causes)):
        assert_no_worse(
            flex_attention(q, k, v, mask),
            compiled(q, k, v, block_mask=same),
            flex_attention(*(x.double() for x in (q, k, v)), mask, kernel="reference"),
        )


def test_a_mask_made_here_equals_torchs():
    for rule, B, H, Nq, Nk, _ in MASKS.values():
        for made, right in zip(
            create_block_mask(rule, B, H, Nq, Nk).as_tuple()[2:10],
            torchs(rule, B, H, Nq, Nk, device="cpu").as_tuple()[2:10],
            strict=True,
        ):
            assert torch.equal(made, right)


def test_what_is_read_off_a_mask_is_kept_as_long_as_it():
    mask = torchs(causal, None, None, N, N, device="cpu")
    first = plans(mask, 2, 3, N, N)
    assert plans(mask, 2, 3, N, N) is first
    plan = ref(first[0].plan)
    del mask, first
    gc.collect()
    assert plan() is None


def test_refusals():
    q, k, v = qkv()
    mask = torchs(noise, None, None, N, N, device="cpu")
    with pytest.raises(ValueError, match="kernel 'gather' cannot run this BlockMask"):
        flex_attention(q, k, v, mask, kernel="gather")
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of"):
        flex_attention(q, k, v, mask, kernel="gatherer")
    by_sample = torchs(prompts, 2, None, N, N, device="cpu")
    with pytest.raises(ValueError, match="block_mask is for 2 samples, q has 1"):
        flex_attention(q[:1], k[:1], v[:1], by_sample)
    short = torchs(causal, None, None, 200, 200, device="cpu")
    with pytest.raises(ValueError, match="block_mask is for 200 tokens of q, which has 300"):
        flex_attention(q, k, v, short)
    with pytest.raises(ValueError, match=r"q, k and v must be \(B, H, N, D\)"):
        flex_attention(q, k[:1], v, mask)
