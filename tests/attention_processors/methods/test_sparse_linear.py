"""Sparse-linear attention: both branches held to slow loops, fitting, storage, training."""

import copy
import json
import math
import os
import signal
import warnings
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from support.checks import assert_no_worse
from support.wan import (
    FRAMES,
    HEADS,
    HEIGHT,
    LAYERS,
    WIDTH,
    euler,
    forward,
    generate,
    gradients,
    pipeline,
    processors,
    transformer,
    two_stage,
)

import gen_accel
from gen_accel import (
    BlockMixture,
    Radial,
    Schedule,
    SparseLinear,
    VideoShape,
    attach,
    attention,
    kernels,
)
from gen_accel.attention_processors.attached import storage
from gen_accel.attention_processors.attached.attachment import attachment_of
from gen_accel.attention_processors.attached.calibrate import measure_calibration
from gen_accel.attention_processors.attached.storage import FILE, KEY, save_processors
from gen_accel.attention_processors.methods import scores
from gen_accel.io import read_tensors, save_tensors
from gen_accel.kernels import linear as linear_kernel
from gen_accel.kernels import reference
from gen_accel.pipelines import SilentBranch
from gen_accel.plan import Plan, unpack

RAGGED = VideoShape(3, 5, 6, text=5)  # no block below divides it
SEMANTICS = ["all", "rest", "marginal"]
PROJECT = SparseLinear(critical=0.3, block_q=16, block_k=16)
ALPHA = SparseLinear(critical=0.3, block_q=16, block_k=16, combine="alpha")
BOTH = pytest.mark.parametrize("method", [PROJECT, ALPHA], ids=["project", "alpha"])
PLACE = "transformer.blocks.0"

quiet = pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")


def killed_at_rename(work):
    """Do it in another process, which ends with no time to tidy up at its first rename."""
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def random_qkv(video, batch=2, heads=2, dim=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, video.tokens, dim)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]


def stirred(branch, seed=0):
    """The branch with random parameters; alpha between 0.2 and 0.8."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=g) * 0.6 + 0.2)
    return branch


def stir(handle):
    for seed, branch in enumerate(handle.branches.values()):
        stirred(branch, seed)


def same_parameters(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def exactly(q, k, v, plan):
    return reference.kernel.forward(q, k, v, plan, scale=q.shape[-1] ** -0.5)


def pairs_of(plan):
    """(B or 1, H or 1, N, N) bool, which tokens see which."""
    rows = unpack(reference.pairs(plan), plan)
    return unpack(rows.transpose(-1, -2), plan).transpose(-1, -2)


# The definition, in loops


def blocks_of(slots, block):
    """The tokens of each block."""
    return [[t for t in held if t >= 0] for held in slots.view(-1, block).tolist()]


def chosen_by_loops(method, q, k, video, rows, columns):
    """Of one head, q and k (N, D): the critical and the linear key blocks of each query block."""
    text = [any(t >= video.video_tokens for t in held) for held in columns]
    ranked = [j for j, held in enumerate(columns) if held and not text[j]]
    count = max(1, int(method.critical * len(ranked)))
    worst = 0
    if method.linear_over == "marginal":
        worst = min(int(method.skipped * len(ranked)), max(len(ranked) - count, 0))
    mean = k.mean(0)
    found = []
    for tokens in rows:
        if not tokens:
            found.append((set(), set()))
            continue
        query = q[tokens].mean(0)
        score = {j: (query @ (k[columns[j]].mean(0) - mean)).item() for j in ranked}
        order = sorted(ranked, key=lambda j: -score[j])
        critical = set(order[:count]) | {j for j, is_text in enumerate(text) if is_text}
        if any(t >= video.video_tokens for t in tokens):
            critical = {j for j, held in enumerate(columns) if held}
        skipped = set(order[len(order) - worst :])
        everything = {j for j, held in enumerate(columns) if held}
        linear = {
            "all": everything,
            "rest": everything - critical,
            "marginal": everything - critical - skipped,
        }[method.linear_over]
        found.append((critical, linear))
    return found


def feature(x, name):
    if name == "softmax":
        powers = [math.exp(value) for value in x.tolist()]
        return torch.tensor([p / sum(powers) for p in powers], dtype=x.dtype)
    if name == "relu":
        return torch.tensor([max(value, 0.0) for value in x.tolist()], dtype=x.dtype)
    values = [value + 1 if value > 0 else math.exp(value) for value in x.tolist()]
    return torch.tensor(values, dtype=x.dtype)


def parts_by_loops(method, q, k, v, video, plan):
    """O_s, O_l and which token sees which exactly, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    B, H, N, D = q.shape
    rows, columns = blocks_of(plan.slots, plan.block_q), blocks_of(plan.slots, plan.block_k)
    o_s, o_l = torch.zeros_like(q), torch.zeros_like(q)
    pairs = torch.zeros(B, H, N, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            qs, ks, vs = q[b, h], k[b, h], v[b, h]
            fk = torch.stack([feature(x, method.feature_map) for x in ks])
            found = chosen_by_loops(method, qs, ks, video, rows, columns)
            for tokens, (critical, linear) in zip(rows, found, strict=True):
                exact = [t for j in sorted(critical) for t in columns[j]]
                approximate = [t for j in sorted(linear) for t in columns[j]]
                for t in tokens:
                    pairs[b, h, t, exact] = True
                    weights = ((ks[exact] @ qs[t]) / math.sqrt(D)).softmax(0)
                    o_s[b, h, t] = weights @ vs[exact]
                    if approximate:
                        products = fk[approximate] @ feature(qs[t], method.feature_map)
                        o_l[b, h, t] = (products @ vs[approximate]) / (products.sum() + 1e-5)
    return o_s, o_l, pairs


class TestParts:
    def test_heads_at_a_time_give_the_same(self, monkeypatch):
        fq, fk, v = (torch.rand(2, 3, 64, 8) for _ in "qkv")
        sets = torch.rand(2, 3, 4, 8) < 0.5
        plan = Plan(torch.arange(64).flip(0), sets, 16, 8)
        whole = linear_kernel.plain(fq, fk, v, plan, sets, eps=1e-5)
        monkeypatch.setattr(linear_kernel, "STATES", 1)
        parts = linear_kernel.linear_attention(fq, fk, v, plan, sets, eps=1e-5)
        assert torch.allclose(parts, whole)

    def test_scores_of_heads_at_a_time_choose_the_same(self, monkeypatch):
        video = VideoShape(4, 8, 8, text=9)
        q, k = (torch.randn(2, 5, video.tokens, 8) for _ in "qk")
        method = SparseLinear(critical=0.2, linear_over="marginal", block_q=16, block_k=8)
        plan, sets = method._chosen(q, k, video, "auto", 1.0)
        monkeypatch.setattr(scores, "AT_ONCE", 1000)
        some, others = method._chosen(q, k, video, "auto", 1.0)
        assert torch.equal(plan.keep, some.keep)
        assert torch.equal(sets, others)

    @pytest.mark.parametrize("tile", ["auto", "raster"])
    @pytest.mark.parametrize("text", [0, 9])
    def test_no_pattern_keeps_more_than_its_lists_hold(self, text, tile):
        video = VideoShape(5, 7, 6, text=text)
        q, k = (torch.randn(2, 3, video.tokens, 8) for _ in "qk")
        plan = SparseLinear(critical=0.2, block_q=16, block_k=8, tile=tile).plan_for(
            q, k, video=video
        )
        kept = plan.keep.sum((-1, -2))
        assert (kept <= plan.entries).all()
        assert plan.entries < 2 * kept.max()

    @pytest.mark.turns(5)
    @pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
    @pytest.mark.parametrize("linear_over", SEMANTICS)
    @pytest.mark.parametrize(
        "blocks",
        [
            {"block_q": 8, "block_k": 8},
            {"block_q": 16, "block_k": 8},
            {"block_q": 4, "block_k": 8},
            {"block_q": 12, "block_k": 8, "tile": "raster"},
        ],
        ids=str,
    )
    def test_they_equal_the_loops(self, blocks, linear_over, feature_map):
        method = SparseLinear(
            critical=0.25, skipped=0.3, linear_over=linear_over, feature_map=feature_map, **blocks
        )
        q, k, v = random_qkv(RAGGED, batch=1)
        plan = method.plan_for(q, k, video=RAGGED)
        o_s, o_l, pairs = parts_by_loops(method, q, k, v, RAGGED, plan)
        assert torch.equal(pairs_of(plan), pairs)
        assert plan.density == pytest.approx(pairs.double().mean().item(), abs=1e-12)

        wide = method.parts(*(x.double() for x in (q, k, v)), video=RAGGED, kernel=exactly)
        low = method.parts(q, k, v, video=RAGGED, kernel=exactly)
        for exact, in_fp64, in_fp32 in zip((o_s, o_l), wide, low, strict=True):
            torch.testing.assert_close(in_fp64, exact, rtol=1e-10, atol=1e-12)
            assert (in_fp32.double() - exact).abs().max() < 1e-4

    @BOTH
    def test_both_outputs_become_one(self, method):
        q, k, v = random_qkv(RAGGED)
        o_s, o_l, _ = parts_by_loops(method, q, k, v, RAGGED, method.plan_for(q, k, video=RAGGED))
        branch = stirred(method.branch(2, 8)).double()
        if branch.alpha is not None:
            alpha = branch.alpha[:, None, None]
            exact = alpha * o_s + (1 - alpha) * o_l
        else:
            weight, bias = branch.proj.weight, branch.proj.bias
            exact = o_s + torch.einsum("bhnd,ed->bhne", o_l, weight) + bias
        options = {"video": RAGGED, "method": method}
        wide = [x.double() for x in (q, k, v)]
        out = attention(*wide, **options, kernel="reference", branch=branch)
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
        branch.float()
        low = attention(q, k, v, **options, kernel="reference", branch=branch)
        assert_no_worse(attention(q, k, v, **options, kernel="gather", branch=branch), low, exact)

    @pytest.mark.parametrize("linear_over", SEMANTICS)
    @pytest.mark.parametrize("critical", [1e-9, 0.05])
    def test_a_block_at_least_is_critical(self, critical, linear_over):
        """Where the public code divides by zero."""
        method = SparseLinear(
            critical=critical, linear_over=linear_over, skipped=0.9, block_q=8, block_k=8
        )
        q, k, v = random_qkv(RAGGED)
        plan = method.plan_for(q, k, video=RAGGED)
        occupied = plan.real.view(-1, 8).any(-1)
        text = (plan.slots >= RAGGED.video_tokens).view(-1, 8).any(-1)
        rows = plan.keep[:, :, occupied & ~text]
        assert (rows[..., ~text].sum(-1) == 1).all()
        out = attention(q, k, v, video=RAGGED, method=method, branch=stirred(method.branch(2, 8)))
        assert torch.isfinite(out).all()

    @pytest.mark.parametrize("linear_over", SEMANTICS)
    @pytest.mark.parametrize("tile", ["auto", "raster"])
    @pytest.mark.parametrize(
        "video", [VideoShape(1, 1, 1), VideoShape(2, 2, 2, text=3), VideoShape(1, 3, 1, text=99)]
    )
    def test_a_video_of_one_block_is_dense(self, video, tile, linear_over):
        method = SparseLinear(linear_over=linear_over, tile=tile)
        q, k, v = random_qkv(video)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        low = F.scaled_dot_product_attention(q, k, v)
        assert_no_worse(attention(q, k, v, video=video, method=method), low, exact)

    @pytest.mark.parametrize("linear_over", ["rest", "marginal"])
    def test_without_a_linear_block_the_branch_is_zero(self, linear_over):
        method = SparseLinear(1.0, 0.0, linear_over, block_q=8, block_k=8)
        q, k, v = random_qkv(RAGGED)
        assert (method.parts(q, k, v, video=RAGGED, kernel=exactly)[1] == 0).all()

    def test_skipped_blocks_are_in_neither_part(self):
        method = SparseLinear(0.25, 0.5, "marginal", block_q=8, block_k=8, tile="raster")
        video = VideoShape(2, 8, 8)
        q, k, v = random_qkv(video)
        q = q.abs()
        k[:, :, :8] = -100.0  # the worst block for every query
        before = method.parts(q, k, v, video=video, kernel=exactly)
        v[:, :, :8] = 1e6
        for one, other in zip(
            before, method.parts(q, k, v, video=video, kernel=exactly), strict=True
        ):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("linear_over", SEMANTICS)
    @BOTH
    def test_samples_alone_and_together(self, method, linear_over):
        method = SparseLinear(**(vars(method) | {"linear_over": linear_over}))
        q, k, v = random_qkv(RAGGED, batch=3)
        branch = stirred(method.branch(2, 8))
        case = {"video": RAGGED, "method": method, "branch": branch}
        together = attention(q, k, v, **case)
        for i in range(3):
            alone = attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], **case)
            assert (alone - together[i : i + 1]).abs().max() < 2e-6

    @pytest.mark.parametrize(
        "video",
        [RAGGED, VideoShape(1, 1, 1), VideoShape(21, 3, 5, text=70), VideoShape(4, 8, 8)],
        ids=str,
    )
    @pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 32), (16, 64), (60, 20)])
    def test_tiles_hold_every_token_once_and_are_compact(self, block_q, block_k, video):
        layout = SparseLinear(block_q=block_q, block_k=block_k).layout(video, torch.device("cpu"))
        slots = layout.slots.slots
        assert sorted(slots[slots >= 0].tolist()) == list(range(video.tokens))
        for block in (block_q, block_k):
            for held in blocks_of(slots, block):
                inside = [t for t in held if t < video.video_tokens]
                assert not inside or len(inside) == len(held)  # text has blocks of its own
                if inside:
                    places = torch.stack(torch.unravel_index(torch.tensor(inside), video.grid))
                    spans = places.amax(1) - places.amin(1) + 1
                    assert spans.prod().item() == len(inside)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("linear_over", SEMANTICS)
    @BOTH
    def test_at_the_start_it_is_sparse_attention_bit_for_bit(self, method, linear_over, dtype):
        method = SparseLinear(**(vars(method) | {"linear_over": linear_over}))
        q, k, v = random_qkv(RAGGED, dtype=dtype)
        case = {"video": RAGGED, "method": method}
        branch = method.branch(2, 8).to(dtype)
        assert branch.silent()
        assert torch.equal(attention(q, k, v, **case, branch=branch), attention(q, k, v, **case))

    @pytest.mark.parametrize("feature_map", ["elu", "relu"])
    @BOTH
    def test_fp16_does_not_overflow(self, method, feature_map):
        method = SparseLinear(**(vars(method) | {"feature_map": feature_map}))
        video = VideoShape(8, 16, 16)
        q, k, v = (4 * x.abs() for x in random_qkv(video, batch=1, dtype=torch.float16))
        out = attention(q, k, v, video=video, method=method, branch=method.branch(2, 8).half())
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"linear_over": "none"}, r"linear_over must be one of .*'marginal'.*, got 'none'"),
        ({"feature_map": "hedgehog"}, r"feature_map must be one of .*, got 'hedgehog'"),
        ({"combine": "sum"}, r"combine must be one of .*, got 'sum'"),
        ({"critical": 0.0}, r"critical must be in \(0, 1\], got 0\.0"),
        ({"critical": math.nan}, r"critical must be in \(0, 1\], got nan"),
        ({"skipped": 1.0}, r"skipped must be in \[0, 1\), got 1\.0"),
        (
            {"critical": 0.6, "skipped": 0.5, "linear_over": "marginal"},
            r"must not exceed 1 together, got 0\.6 and 0\.5",
        ),
        ({"block_q": 0}, r"block_q must be a whole number from 1 to 1048576, got 0"),
        ({"block_q": 64, "block_k": 48}, r"multiple of the other, got 64 and 48.*'raster'"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SparseLinear(**options)


def test_a_branch_for_a_method_without_parameters_is_refused():
    q, k, v = random_qkv(RAGGED)
    with pytest.raises(ValueError, match=r"Radial has no branch, got branch="):
        attention(q, k, v, video=RAGGED, method=Radial(), branch=PROJECT.branch(2, 8))


@quiet
def names_of(model):
    return {p: name for name, p in model.named_parameters()}


class TestParameters:
    @BOTH
    def test_they_are_the_models(self, method):
        model = transformer()
        before = set(model.state_dict())
        with attach(model, method) as handle:
            ours = {id(p) for b in handle.branches.values() for p in b.parameters()}
            assert ours <= {id(p) for p in model.parameters()}
            names = {"alpha"} if method.combine == "alpha" else {"proj.weight", "proj.bias"}
            added = {
                f"blocks.{layer}.attn1.processor.branch.{name}"
                for layer in range(LAYERS)
                for name in names
            }
            assert set(model.state_dict()) - before == added
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                model.to(dtype)
                assert {p.dtype for b in handle.branches.values() for p in b.parameters()} == {
                    dtype
                }
            model.requires_grad_(False)
            assert not any(p.requires_grad for p in handle.branches[PLACE].parameters())
        assert set(model.state_dict()) == before

    @BOTH
    def test_they_have_the_dtype_of_the_model(self, method):
        model = transformer().to(torch.bfloat16)
        with attach(model, method) as handle:
            assert {p.dtype for p in handle.branches[PLACE].parameters()} == {torch.bfloat16}

    @BOTH
    def test_a_state_dict_carries_them(self, method):
        first, second = transformer(), transformer(seed=1)
        with attach(first, method) as handle, attach(second, method):
            stir(handle)
            second.load_state_dict(first.state_dict())
            assert torch.equal(forward(second), forward(first))
        with pytest.raises(RuntimeError, match="Unexpected key"), attach(first, method):
            second.load_state_dict(first.state_dict())

    @BOTH
    def test_a_step_of_training_reaches_them(self, method):
        model = transformer()
        with attach(model, method) as handle:
            ours = dict(handle.branches[PLACE].named_parameters())
            before = {name: p.detach().clone() for name, p in ours.items()}
            out = forward(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            loss = forward(model).square().mean()
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    assert torch.isfinite(parameter.grad).all(), name
            assert all(p.grad.abs().max() > 0 for p in ours.values())
            optimizer.step()
            assert all(not torch.equal(p, before[name]) for name, p in ours.items())
            after = forward(model)
        assert torch.isfinite(after).all()
        assert not torch.equal(after, out)

    @BOTH
    def test_peft_beside_them(self, method):
        model = transformer()
        with attach(model, method) as handle:
            stir(handle)
            plain = forward(model)
            torch.manual_seed(7)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
            assert not torch.allclose(forward(model), plain, atol=1e-3)
            for branch in handle.branches.values():
                branch.requires_grad_(True)
            grads = gradients(model)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert grads.keys() == trained
            assert {n.split(".")[-2] for n in trained if "lora" not in n} <= {"proj", "branch"}
            assert all(torch.isfinite(g).all() for g in grads.values())
            ours = [g for n, g in grads.items() if "lora" not in n]
            assert len(ours) == LAYERS * len(list(handle.branches[PLACE].parameters()))
            assert all(g.abs().max() > 0 for g in ours)
            assert all("lora_" in name for name in get_peft_model_state_dict(model))
            model.disable_adapters()
            assert torch.equal(forward(model), plain)

    def test_attaching_again_leaves_none_of_the_earlier_ones(self):
        model = transformer()
        stock = set(model.state_dict())
        first = attach(model, PROJECT)
        stir(first)
        second = attach(model, ALPHA)
        assert {name.split(".")[-1] for name in set(model.state_dict()) - stock} == {"alpha"}
        first.detach()
        assert attachment_of(model) is second
        with attach(model, Radial()):
            assert set(model.state_dict()) == stock

    def test_the_attention_backend_reaches_the_stock_processor(self):
        model = transformer()
        stock = [block.attn1.processor for block in model.blocks]
        with attach(model, PROJECT, schedule=Schedule(dense_layers=1)):
            model.set_attention_backend("_native_math")
            assert {p._attention_backend.value for p in stock} == {"_native_math"}
            forward(model)
            model.reset_attention_backend()
            assert {p._attention_backend for p in stock} == {None}

    @BOTH
    def test_gradient_checkpointing(self, method):
        model = transformer()
        with attach(model, method) as handle:
            stir(handle)
            plain = gradients(model)
            model.enable_gradient_checkpointing()
            again = gradients(model)
        assert plain.keys() == again.keys()
        assert all(
            (again[n] - g).abs().max() < 1e-5 * (1 + g.abs().max()) for n, g in plain.items()
        )

    @pytest.mark.turns(5)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"combine": "alpha", "linear_over": "all"},
            {"linear_over": "marginal", "tile": "raster"},
        ],
        ids=str,
    )
    @pytest.mark.slow
    def test_one_graph_equals_eager(self, options):
        torch._dynamo.reset()
        model = transformer(num_layers=1)
        with attach(model, SparseLinear(**(vars(PROJECT) | options))) as handle:
            stir(handle)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            exact, found = gradients(model), gradients(compiled)
            assert any("branch" in name for name in exact)
            for name, grad in exact.items():
                error = (found[f"_orig_mod.{name}"] - grad).abs().max()
                assert error < 1e-5 * (1 + grad.abs().max())
            assert (forward(compiled) - forward(model)).abs().max() < 1e-5
        torch._dynamo.reset()

    @BOTH
    def test_autocast_trains(self, method):
        model = transformer()
        with attach(model, method) as handle:
            stir(handle)
            plain = forward(model)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = forward(model)
            assert (out.float() - plain).abs().max() < 0.1 * plain.abs().max()
            out.float().square().mean().backward()
            assert all(torch.isfinite(p.grad).all() for p in handle.branches[PLACE].parameters())

    def test_offloaded_weights(self):
        model = transformer()
        cpu_offload(model, execution_device=torch.device("cpu"))
        with attach(model, PROJECT) as handle:
            stir(handle)
            assert torch.isfinite(forward(model)).all()

    @BOTH
    def test_weights_offloaded_after_attaching(self, method, tmp_path):
        model = transformer()
        with attach(model, method) as handle:
            stir(handle)
            expected = forward(model)
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert torch.equal(forward(model), expected)
            with pytest.raises(ValueError, match="offloaded: load and save before"):
                gen_accel.save_processors(model, tmp_path)

    def test_dense_layers_have_no_parameters(self):
        model = transformer()
        with attach(model, PROJECT, schedule=Schedule(dense_layers=1)) as handle:
            assert [*handle.branches] == ["transformer.blocks.1"]
            forward(model).square().mean().backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is not None for p in trained if "branch" in names_of(model)[p])

    @BOTH
    def test_attaching_draws_no_random_numbers(self, method):
        model = transformer()
        before = torch.get_rng_state()
        with attach(model, method):
            assert torch.equal(torch.get_rng_state(), before)

    @BOTH
    def test_autocast_leaves_the_linear_branch_in_fp32(self, method):
        video = VideoShape(5, 9, 10, text=7)
        q, k, v = (torch.randn(1, 2, video.tokens, 16) for _ in "qkv")

        def parts():
            run = partial(kernels.run, scale=0.25, kernel="gather")
            return method.parts(q, k, v, video=video, kernel=run)

        exact, linear = parts()
        with torch.autocast("cpu", torch.bfloat16):
            low, same = parts()
        assert torch.equal(same, linear)
        assert low.dtype == torch.bfloat16  # as torch's own attention
        assert (low - exact).norm() < 0.01 * exact.norm()

    @BOTH
    def test_detach_leaves_the_model_as_it_was(self, method):
        model = transformer()
        stock, original = forward(model), processors(model)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with attach(model, method) as handle:
            stir(handle)
            assert not torch.allclose(forward(model), stock, atol=1e-3)
        assert same_parameters(model.state_dict(), before)
        assert list(model.state_dict()) == list(before)
        assert all(a is b for a, b in zip(processors(model), original, strict=True))
        assert torch.equal(forward(model), stock)

    def test_a_copied_pipeline_has_parameters_of_its_own(self):
        pipe = pipeline()
        handle = attach(pipe, PROJECT)
        stir(handle)
        expected = generate(pipe)
        twin = copy.deepcopy(pipe)
        other = attachment_of(twin)
        assert other is not handle
        assert {id(p) for p in twin.transformer.parameters()}.isdisjoint(
            id(p) for p in pipe.transformer.parameters()
        )
        for branch in other.branches.values():
            assert any(p is q for p in branch.parameters() for q in twin.transformer.parameters())
        assert torch.equal(generate(twin), expected)
        stirred(other.branches[PLACE], seed=9)
        assert torch.equal(generate(pipe), expected)
        assert not torch.allclose(generate(twin), expected, atol=1e-4)
        handle.detach()
        assert attachment_of(twin) is other

    def test_a_copied_pipeline_keeps_its_own_schedule(self):
        pipe = pipeline(scheduler=euler())
        attach(pipe, PROJECT, schedule=Schedule(dense_start=0.5))
        twin = copy.deepcopy(pipe)
        generate(pipe, 2)
        generate(twin, 4)
        steps = attachment_of(twin).summary().to_dict()["layers"][PLACE]["steps"]
        dense = "dense (first steps)"
        assert steps == {0: "sparse", 1: dense, 2: dense, 3: "sparse"}


class TestWarning:
    def silent(self, function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
        return [w for w in caught if issubclass(w.category, SilentBranch)]

    @pytest.mark.parametrize("make", [pipeline, two_stage, transformer])
    def test_attaching_uncalibrated_warns_once_at_the_caller(self, make):
        target = make()
        (warning,) = self.silent(lambda: attach(target, PROJECT))
        assert "calibrate" in str(warning.message)
        assert warning.filename == __file__
        assert len(self.silent(lambda: attach(target, ALPHA))) == 1  # it starts afresh
        assert not self.silent(lambda: forward(getattr(target, "transformer", target)))

    @pytest.mark.parametrize("method", [Radial(), BlockMixture()], ids=str)
    def test_methods_without_parameters_do_not(self, method):
        assert not self.silent(lambda: attach(transformer(), method))

    @pytest.mark.parametrize("fitted", [True, False])
    def test_loading_does_not(self, fitted, tmp_path):
        model = transformer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SilentBranch)
            handle = attach(model, PROJECT)
        if fitted:
            stir(handle)
        gen_accel.save_processors(model, tmp_path)
        assert not self.silent(lambda: gen_accel.load_processors(model, tmp_path))


@quiet
class TestStorage:
    @BOTH
    def test_what_is_loaded_is_what_was_saved(self, method, tmp_path):
        model, other = transformer(), transformer()
        handle = attach(model, method, schedule=Schedule(dense_layers=(1,)), kernel="reference")
        stir(handle)
        expected = forward(model)
        assert gen_accel.save_processors(handle, tmp_path) == tmp_path
        loaded = gen_accel.load_processors(other, tmp_path)
        assert loaded.method == method
        assert (loaded.schedule, loaded.kernel) == (handle.schedule, "reference")
        for name, branch in handle.branches.items():
            assert same_parameters(branch.state_dict(), loaded.branches[name].state_dict())
        assert torch.equal(forward(other), expected)
        assert all(p.requires_grad for p in loaded.branches[PLACE].parameters())
        again = gen_accel.save_processors(other, tmp_path / "again")
        assert (again / FILE).read_bytes() == (tmp_path / FILE).read_bytes()

    @pytest.mark.parametrize(
        "method",
        [
            BlockMixture(chunk_2d=(3, 4), chunk_3d=(1, 2, 3), topk=(1, 2, 3), threshold=0.1),
            Radial(decay_factor=1 / 3),
        ],
        ids=str,
    )
    def test_methods_without_parameters_too(self, method, tmp_path):
        model = transformer()
        with attach(model, method, schedule=Schedule(dense_layers=1, dense_steps=3)) as handle:
            gen_accel.save_processors(model, tmp_path)
        with gen_accel.load_processors(model, tmp_path) as loaded:
            assert loaded.method == method
            assert hash(loaded.method) == hash(method)
            assert loaded.schedule == handle.schedule

    def test_both_transformers(self, tmp_path):
        pipe, other = two_stage(), two_stage()
        stir(attach(pipe, PROJECT))
        gen_accel.save_processors(pipe, tmp_path)
        gen_accel.load_processors(other, tmp_path)
        assert torch.equal(generate(other, 4), generate(pipe, 4))
        with pytest.raises(ValueError, match=r"does not fit this model: 4 parameters.*r_2\.blo"):
            gen_accel.load_processors(other.transformer, tmp_path)

    def test_options_of_attach_replace_those_saved(self, tmp_path):
        model = transformer()
        with attach(model, ALPHA):
            gen_accel.save_processors(model, tmp_path)
        fewer = Schedule(dense_layers=1)
        options = {"schedule": fewer, "kernel": "gather", "self_check": True}
        with gen_accel.load_processors(model, tmp_path, **options) as handle:
            assert (handle.schedule, handle.kernel) == (fewer, "gather")
            forward(model)
            gen_accel.save_processors(model, tmp_path)
        with pytest.raises(ValueError, match=r"does not fit.*transformer\.blocks\.0\.alpha"):
            gen_accel.load_processors(model, tmp_path, schedule=Schedule())

    @pytest.mark.parametrize(
        ("saved", "config", "name"),
        [
            (PROJECT, {"num_layers": 1}, r"transformer\.blocks\.1\.proj"),
            (PROJECT, {"num_layers": 3}, r"transformer\.blocks\.2\.proj"),
            (PROJECT, {"attention_head_dim": 32, "num_attention_heads": 1}, r"blocks\.0\.proj"),
            (ALPHA, {"attention_head_dim": 8, "num_attention_heads": 4}, r"blocks\.0\.alpha"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_names(self, saved, config, name, tmp_path):
        model, other = transformer(), transformer(**config)
        with attach(model, saved):
            gen_accel.save_processors(model, tmp_path)
        earlier = attach(other, Radial(decay_factor=0.2))
        with pytest.raises(ValueError, match=rf"does not fit this model: \d+ param.*{name}"):
            gen_accel.load_processors(other, tmp_path)
        assert attachment_of(other) is earlier

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
    @pytest.mark.parametrize("second", [ALPHA, Radial()], ids=str)
    def test_a_save_that_is_killed_leaves_the_earlier_file(self, second, tmp_path):
        """Before its one rename; the next save goes through."""
        model, other = transformer(), transformer()
        stir(attach(model, PROJECT))
        expected = forward(model)
        gen_accel.save_processors(model, tmp_path)
        stir(attach(model, second))
        killed_at_rename(lambda: save_processors(model, tmp_path))
        assert gen_accel.load_processors(other, tmp_path).method == PROJECT
        assert torch.equal(forward(other), expected)
        gen_accel.save_processors(model, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert gen_accel.load_processors(other, tmp_path).method == second

    def test_a_save_that_fails_early_keeps_the_earlier_one(self, tmp_path, monkeypatch):
        model = transformer()
        handle = attach(model, PROJECT)
        stir(handle)
        kept = {n: p.clone() for n, p in handle.branches[PLACE].state_dict().items()}
        gen_accel.save_processors(model, tmp_path)

        def full(*args):
            raise OSError("no space left")

        monkeypatch.setattr(storage, "save_tensors", full)
        stirred(handle.branches[PLACE], seed=5)
        with pytest.raises(OSError, match="no space"):
            gen_accel.save_processors(model, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [FILE]
        loaded = gen_accel.load_processors(model, tmp_path)
        assert same_parameters(loaded.branches[PLACE].state_dict(), kept)

    def test_a_lost_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{FILE} is missing"):
            gen_accel.load_processors(transformer(), tmp_path)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"version": 1}, "its version is 1, not 2; save again"),
            ({"options": {"critcal": 0.1}}, "not what save_processors writes"),
            ({"method": "sparse_liner"}, "did you mean 'sparse_linear'"),
            ({"kernel": 3}, "kernel in .* must be text, got 3"),
            ({"sha256": "0" * 64}, "do not belong together"),
        ],
    )
    def test_a_changed_config_is_refused(self, change, match, tmp_path):
        model = transformer()
        with attach(model, PROJECT):
            gen_accel.save_processors(model, tmp_path)
        tensors, metadata = read_tensors(tmp_path / FILE)
        about = json.loads(metadata[KEY]) | change
        save_tensors(tensors, tmp_path / FILE, {KEY: json.dumps(about)})
        with pytest.raises(ValueError, match=match):
            gen_accel.load_processors(model, tmp_path)

    def test_damaged_parameters_are_refused(self, tmp_path):
        model = transformer()
        with attach(model, PROJECT):
            gen_accel.save_processors(model, tmp_path)
        data = bytearray((tmp_path / FILE).read_bytes())
        data[-1] ^= 1  # in the last number
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(ValueError, match="do not belong together"):
            gen_accel.load_processors(model, tmp_path)

    def test_unknown_options_are_refused(self, tmp_path):
        model = transformer()
        with attach(model, PROJECT):
            gen_accel.save_processors(model, tmp_path)
        with pytest.raises(TypeError, match=r"options of attach are .*, got kernle"):
            gen_accel.load_processors(model, tmp_path, kernle="flex")

    def test_nothing_attached_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="nothing is attached"):
            gen_accel.save_processors(transformer(), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_method_of_ones_own_is_refused(self, tmp_path):
        class Own(Radial):
            pass

        model = transformer()
        with (
            attach(model, Own()),
            pytest.raises(ValueError, match="a class that a function"),
        ):
            gen_accel.save_processors(model, tmp_path)


SAMPLED = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,  # one call a step
    "max_sequence_length": 16,
}
ONE_CALL = HEADS * 3 * 5 * 7  # rows of one attention


def measured(pipe, handle, prompts, **options):
    """Relative error of each layer on the dense trajectory, from the outputs themselves."""
    squares: dict[str, list[float]] = {}

    def observe(call):
        layer, q, k, v, dense, video, run = call
        branch = handle.branches[layer.name]
        with torch.no_grad():
            out = layer.method(q, k, v, video=video, kernel=run, branch=branch)
        sums = squares.setdefault(layer.name, [0.0, 0.0])
        sums[0] += (dense - out).double().square().sum().item()
        sums[1] += dense.double().square().sum().item()

    handle.observe = observe
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(i)
        pipe(prompt, generator=generator, output_type="latent", **(SAMPLED | options))
    handle.observe = None
    return {name: math.sqrt(error / dense) for name, (error, dense) in squares.items()}


@quiet
class TestCalibration:
    def test_one_string_is_no_list_of_prompts(self):
        pipe = pipeline()
        attach(pipe, PROJECT)
        with pytest.raises(ValueError, match=r"must be a list .* got 'a cat'"):
            gen_accel.calibrate(pipe, "a cat")

    @pytest.mark.turns(3)
    @pytest.mark.parametrize(
        ("combine", "linear_over"),
        [
            ("project", "rest"),
            ("alpha", "all"),
            *(
                pytest.param(*both, marks=pytest.mark.slow)
                for both in [("project", "all"), ("project", "marginal"), ("alpha", "rest")]
            ),
        ],
    )
    def test_every_layer_errs_less_by_what_is_said(self, combine, linear_over):
        pipe, prompts = pipeline(), ["a", "a red square"]
        options = {"combine": combine, "linear_over": linear_over, "tile": "raster"}
        handle = attach(pipe, SparseLinear(**(vars(PROJECT) | options)))
        before = measured(pipe, handle, prompts)
        fit = gen_accel.calibrate(pipe, prompts, **SAMPLED)
        after = measured(pipe, handle, prompts)
        assert len(fit.layers) == LAYERS
        for layer in fit.layers:
            assert layer.before == pytest.approx(before[layer.name], rel=1e-4)
            assert layer.after == pytest.approx(after[layer.name], rel=1e-3)
            assert layer.after < layer.before
            assert layer.samples == 2 * 2 * ONE_CALL
        again = measure_calibration(pipe, prompts, **SAMPLED)
        for one, other in zip(again.layers, fit.layers, strict=True):
            assert (one.name, one.samples) == (other.name, other.samples)
            assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=1e-3)
        assert not any(branch.silent() for branch in handle.branches.values())
        assert fit.after < fit.before
        assert fit.to_dict()["layers"].keys() == handle.branches.keys()
        assert len(str(fit).splitlines()) == LAYERS + 2
        if combine == "alpha":
            alphas = torch.stack([branch.alpha for branch in handle.branches.values()])
            assert ((alphas >= 0) & (alphas <= 1)).all()

    def test_no_other_alpha_would_do_better(self):
        """Least squares: a step to either side raises the error, where alpha is not at an end."""
        pipe = pipeline()
        handle = attach(pipe, ALPHA)
        gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        best = measured(pipe, handle, ["a"])[PLACE]
        alpha = handle.branches[PLACE].alpha
        inside = [head for head in range(HEADS) if 0.05 < alpha[head] < 0.95]
        assert inside
        for head, step in product(inside, (-0.02, 0.02)):
            with torch.no_grad():
                alpha[head] += step
                assert measured(pipe, handle, ["a"])[PLACE] > best
                alpha[head] -= step

    @BOTH
    def test_a_single_step_of_a_single_prompt_does_no_harm(self, method):
        pipe = pipeline()
        attach(pipe, method)
        fit = gen_accel.calibrate(pipe, ["a"], **(SAMPLED | {"num_inference_steps": 1}))
        assert all(layer.after <= layer.before for layer in fit.layers)

    def test_the_trajectory_is_dense_and_a_second_fit_is_the_same(self):
        pipe, latents = pipeline(), []

        def keep(pipe, step, timestep, tensors):
            latents.append(tensors["latents"])
            return tensors

        def run():
            options = SAMPLED | {"output_type": "latent", "callback_on_step_end": keep}
            pipe("a", generator=torch.Generator().manual_seed(3), **options)
            return torch.stack(latents[-2:])

        stock = run()
        # So that no tile is tried, and all keys of the text are counted as the model counts them.
        handle = attach(pipe, replace(PROJECT, tile="raster"), padding_once=False)
        first = gen_accel.calibrate(pipe, ["a"], seed=3, callback_on_step_end=keep, **SAMPLED)
        assert torch.equal(torch.stack(latents[-2:]), stock)
        fitted = {n: p.clone() for n, p in handle.branches[PLACE].state_dict().items()}
        second = gen_accel.calibrate(pipe, ["a"], seed=3, callback_on_step_end=keep, **SAMPLED)
        assert torch.equal(torch.stack(latents[-2:]), stock)
        assert second == first
        assert same_parameters(handle.branches[PLACE].state_dict(), fitted)
        assert handle.observe is None
        assert not torch.allclose(run(), stock, atol=1e-3)
        handle.detach()
        assert torch.equal(run(), stock)

    def test_dense_layers_and_steps_are_left_out(self):
        pipe = pipeline(scheduler=euler())
        handle = attach(pipe, PROJECT, schedule=Schedule(dense_layers=1, dense_start=0.5))
        fit = gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        assert [layer.name for layer in fit.layers] == ["transformer.blocks.1"]
        assert fit.layers[0].samples == ONE_CALL
        assert PLACE not in handle.branches

    def test_what_has_nothing_to_fit_is_refused(self):
        pipe = pipeline()
        with pytest.raises(ValueError, match="nothing is attached"):
            gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        with attach(pipe, Radial()), pytest.raises(ValueError, match="has nothing to fit"):
            gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        with (
            attach(pipe, PROJECT, schedule=Schedule(dense_layers=2)),
            pytest.raises(ValueError, match=r"has nothing to fit.*dense_layers=2"),
        ):
            gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        with attach(pipe, PROJECT, schedule=Schedule(dense_steps=2)) as handle:
            with pytest.raises(ValueError, match="prompts must be a list that holds at least one"):
                gen_accel.calibrate(pipe, [], **SAMPLED)
            with pytest.raises(ValueError, match="keeps all of 2 steps dense"):
                gen_accel.calibrate(pipe, ["a"], **SAMPLED)
            assert handle.observe is None

    def test_a_compiled_model_is_fitted_or_refused_for_that(self):
        torch._dynamo.reset()
        pipe = pipeline()
        attach(pipe, PROJECT)
        pipe.transformer.compile(backend="eager")
        try:
            gen_accel.calibrate(pipe, ["a"], **SAMPLED)
        except ValueError as error:
            assert "compile" in str(error)  # noqa: PT017
        finally:
            torch._dynamo.reset()

    def test_a_generation_that_fails_leaves_nothing_behind(self):
        pipe = pipeline()
        handle = attach(pipe, PROJECT)
        with pytest.raises(ValueError, match="divisible by 16"):
            gen_accel.calibrate(pipe, ["a"], **(SAMPLED | {"height": 81}))
        assert handle.observe is None
        assert all(branch.silent() for branch in handle.branches.values())

    @pytest.mark.parametrize(
        "method",
        [
            SparseLinear(critical=1.0, block_q=16, block_k=16),
            SparseLinear(block_q=256, block_k=256),
            SparseLinear(critical=1.0, combine="alpha", block_q=16, block_k=16),
        ],
        ids=["all critical", "one block", "alpha"],
    )
    def test_where_nothing_is_linear_nothing_is_fitted(self, method):
        pipe = pipeline()
        handle = attach(pipe, method)
        for layer in gen_accel.calibrate(pipe, ["a"], **SAMPLED).layers:
            assert layer.after <= layer.before < 1e-5
        for parameter in handle.branches[PLACE].parameters():
            assert torch.isfinite(parameter).all()
        assert max(measured(pipe, handle, ["a"]).values()) < 1e-4

    def test_both_transformers_are_fitted(self):
        pipe = two_stage()
        handle = attach(pipe, ALPHA)
        fit = gen_accel.calibrate(pipe, ["a"], **(SAMPLED | {"num_inference_steps": 4}))
        assert {layer.name for layer in fit.layers} == handle.branches.keys()
        assert all(layer.after <= layer.before for layer in fit.layers)
