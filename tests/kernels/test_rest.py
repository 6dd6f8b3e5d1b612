"""The rest of a plan and the log-sum-exp that it is merged by, of every kernel that runs here."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_no_worse
from support.problems import (
    RESTS,
    all_picked,
    answers,
    assert_answers_no_worse,
    differentiates,
    random_plan,
    with_rest,
)
from support.products import pairs

from gen_accel import kernels
from gen_accel.kernels import KERNELS, allowance, facts_of, flex, gather, reference, rest, routed
from gen_accel.kernels.base import Kernel
from gen_accel.kernels.rest import curve_of
from gen_accel.plan import CURVATURE, MOST_GAINED, ORDERS, Plan, Rest

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

SCALE = 0.3
# Those of libraries that need a GPU, and flex, which has no log-sum-exp on the CPU, are held in
# files of their own, and routed takes no plan with a rest.
ELSEWHERE = ("fa4", "flex", "natten", "routed", "triton_int8", "xformers")
HERE = [name for name in KERNELS if name not in ELSEWHERE]
HELD = [name for name in HERE if name not in ("reference", "triton")]
TRAINED = [name for name in HELD if differentiates(name)]


def whole(**options):
    """Blocks without padding, in order; a row that keeps all, and one that keeps nothing."""
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(1, 2, 8, 8, generator=g) < 0.4
    keep[:, :, 2], keep[:, :, 5] = True, False
    return Plan(torch.arange(128), keep, 16, 16, **options)


def ragged(rest=None, **options):
    return random_plan("cpu", rest=rest, **options)


PLANS = {
    "whole": whole,
    "ragged, batch and heads": partial(ragged, batch=2, heads=2),
    "ragged, small query blocks": partial(ragged, heads=2, block_q=8, block_k=32),
    "ragged, small key blocks": partial(ragged, batch=2, block_q=32, block_k=8),
}
OWN = [Rest("query"), Rest("key"), Rest("query", "second")]  # that our own kernels add
ASKED = {"the log-sum-exp alone": None, **RESTS}
DTYPES = (torch.float32, torch.bfloat16)


def by(name, plan):
    return partial(kernels.run_lse, plan=plan, scale=SCALE, kernel=name)


def by_reference(plan):
    return partial(reference.kernel.forward_lse, plan=plan, scale=SCALE)


@pytest.mark.parametrize(
    ("kernel", "name", "asked", "dtype"), pairs(TRAINED, [*PLANS], [*ASKED], DTYPES), ids=str
)
def test_outputs_and_gradients_match_the_reference(kernel, name, asked, dtype, qkv):
    plan = PLANS[name](rest=ASKED[asked])
    inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
    assert_answers_no_worse(by(kernel, plan), by_reference(plan), inputs)


@pytest.mark.parametrize(
    ("kernel", "name", "asked", "dtype"),
    pairs([name for name in HELD if name not in TRAINED], [*PLANS], [*ASKED], DTYPES),
    ids=str,
)
def test_outputs_without_a_gradient_match_the_reference(kernel, name, asked, dtype, qkv):
    plan = PLANS[name](rest=ASKED[asked])
    inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
    exact, low = (by_reference(plan)(*x) for x in ([x.double() for x in inputs], inputs))
    out, lse = by(kernel, plan)(*inputs)
    more = allowance(kernel, *inputs, plan, scale=SCALE)
    assert_no_worse(out, low[0], exact[0], more=more)
    dark = exact[1].isneginf()
    assert torch.equal(lse.isneginf(), dark)
    assert lse.dtype == torch.float32


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
def test_triton_matches_the_reference(asked, qkv):
    plan = random_plan("cpu", block_q=32, block_k=32, rest=ASKED[asked])
    inputs = [x.cpu() for x in qkv(plan.tokens, batch=1, heads=1)]
    if reasons := kernels.unsupported("triton", facts_of(*inputs, plan)):
        pytest.skip("; ".join(reasons))
    assert_answers_no_worse(by("triton", plan), by_reference(plan), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"windows": True}, {"route": True}], ids=str)
@pytest.mark.parametrize("kernel", [*TRAINED, "routed"])
def test_the_log_sum_exp_of_rules_on_pairs(kernel, options, dtype, qkv):
    plan = random_plan("cpu", batch=2, heads=2, **options)
    if "route" in options and kernel != "gather":
        plan = all_picked(plan)
    inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
    if kernel == "routed" and "route" not in options:
        with pytest.raises(ValueError, match="each query picks its key blocks"):
            by(kernel, plan)(*inputs)
        return
    assert_answers_no_worse(by(kernel, plan), by_reference(plan), inputs)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_products_of_gather_with_tiles_and_without(dtype, tiles, monkeypatch, qkv):
    monkeypatch.setattr(gather, "has_tiles", lambda device: tiles)
    monkeypatch.setattr(gather, "LARGE", 1)
    plan = random_plan("cpu", heads=2, windows=True)
    inputs = [x.cpu() for x in qkv(plan.tokens, dtype)]
    assert gather._fuses(inputs[0], plan.block_q) == tiles
    assert_answers_no_worse(by("gather", plan), by_reference(plan), inputs)
    damped = plan.changed(gain=torch.full((1, 1, 8, 8), 0.6))
    assert_answers_no_worse(by("gather", damped), by_reference(damped), inputs)


@pytest.mark.parametrize("kernel", [gather, routed])
def test_a_wide_output_is_not_rounded(kernel, monkeypatch, qkv):
    monkeypatch.setattr(gather, "has_tiles", lambda device: False)
    plan = all_picked(random_plan("cpu", batch=2, heads=2, route=True))
    inputs = [x.cpu() for x in qkv(plan.tokens, torch.bfloat16)]
    found, low = (
        answers(
            partial(x.kernel.forward_lse, plan=plan, scale=SCALE, wide=True),
            inputs,
            torch.bfloat16,
        )
        for x in (kernel, reference)
    )
    exact, _ = answers(by_reference(plan), inputs, torch.float64)
    assert found[0][0].dtype == torch.float32
    for three in zip(found[0], low[0], exact, strict=True):
        assert_no_worse(*three)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("asked", ["the log-sum-exp alone", "around queries"])
def test_flex_where_it_gives_a_log_sum_exp(asked, monkeypatch, qkv):
    """On the CPU it gives one uncompiled alone, and then reads nothing but `mask_mod`."""

    def by_pair(plan):
        step_q, step_k = plan.block_q, plan.block_k
        return lambda b, h, i, j: plan.real[j] & plan.keep[0, h, i // step_q, j // step_k]

    monkeypatch.setattr(flex, "_mask_mod", by_pair)
    plan = ragged(ASKED[asked], heads=2)
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    said = kernels.unsupported("flex", facts_of(*inputs, plan, lse=True))
    assert "FlexAttention gives no log-sum-exp on the CPU" in said
    monkeypatch.setattr(flex, "_fresh", flex._call)
    forward = partial(flex.kernel.forward_lse, plan=plan, scale=SCALE)
    if plan.rest is not None:
        forward = partial(rest.attention, flex.kernel, plan=plan, scale=SCALE, kernel="flex")
    with torch.no_grad():
        found, low = forward(*inputs), by_reference(plan)(*inputs)
        exact = by_reference(plan)(*(x.double() for x in inputs))
    dark = exact[1].isneginf()
    assert torch.equal(found[1].isneginf(), dark)
    assert_no_worse(found[0], low[0], exact[0])
    assert_no_worse(*(x[1].masked_fill(dark, 0.0) for x in (found, low, exact)))


@pytest.mark.parametrize("asked", RESTS)
@pytest.mark.parametrize("kernel", ["reference", *HELD])
def test_run_says_which_kernel_and_returns_what_is_asked(kernel, asked, qkv):
    """With a rest an output alone, with and without a gradient."""
    plan = ragged(RESTS[asked], heads=2)
    told = []
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    asked = {"scale": SCALE, "kernel": kernel, "report": told.append}
    out = kernels.run(*inputs, plan, **asked)
    again, lse = kernels.run_lse(*inputs, plan, **asked)
    assert torch.equal(out, again)
    assert lse.shape == out.shape[:3]
    assert [choice.kernel for choice in told] == [kernel] * 2


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gives_the_log_sum_exp_or_says_why_not(name, qkv):
    plan = all_picked(random_plan("cpu", heads=2, route=True)) if name == "routed" else whole()
    inputs = [x.cpu() for x in qkv(plan.tokens)]
    reasons = kernels.unsupported(name, facts_of(*inputs, plan, lse=True))
    if reasons:
        with pytest.raises(ValueError, match=f"no kernel for .*\n  {name}: ") as error:
            by(name, plan)(*inputs)
        assert all(reason in str(error.value) for reason in reasons)
        return
    out, lse = by(name, plan)(*inputs)
    low, exact = by_reference(plan)(*inputs), by_reference(plan)(*(x.double() for x in inputs))
    assert_no_worse(out, low[0], exact[0], more=allowance(name, *inputs, plan, scale=SCALE))
    assert torch.equal(lse.isneginf(), exact[1].isneginf())


def by_hand(q, k, v, plan, head):
    """Output (N, D) and log-sum-exp (N,) of one head as `Rest` writes them, query by query."""
    blocks_q, blocks_k = (
        [[t for t in row if t >= 0] for row in plan.slots.view(-1, block).tolist()]
        for block in (plan.block_q, plan.block_k)
    )
    every = [t for block in blocks_k for t in block]
    slope = sum(
        torch.outer(k[t] - k[block].mean(0), v[t]) for block in blocks_k for t in block
    ) / len(every)
    bent = plan.rest.order == "second"
    counted = len(q) if plan.rest.tokens is None else plan.rest.tokens
    w, u = (mean_squares(x, counted, blocks) for x, blocks in ((q, blocks_q), (k, blocks_k)))
    out, lse = torch.empty_like(v), torch.empty(len(v), dtype=v.dtype)
    for i, mine in enumerate(blocks_q):
        for t in mine:
            scores, values, of_rest = [], [], []
            for j, block in enumerate(blocks_k):
                if plan.keep[0, head, i, j]:
                    scores += [SCALE * q[t] @ k[s] for s in block]
                    values += [v[s] for s in block]
                    of_rest += [False] * len(block)
                elif block and plan.rest.centre == "key":
                    scores.append(SCALE * q[t] @ k[block].mean(0) + math.log(len(block)))
                    values.append(v[block].mean(0))
                    of_rest.append(True)
                elif block:
                    mean = q[mine].mean(0)
                    each = SCALE * k[block] @ mean
                    p = each.softmax(0)
                    key, off = p @ k[block], q[t] - mean
                    score = each.logsumexp(0) + SCALE * off @ key
                    if bent:
                        variance = p @ (k[block] - key) ** 2
                        a = SCALE**2 * (u @ off**2) / (w @ u)
                        score = score + min(CURVATURE * a * (w @ variance), MOST_GAINED)
                    scores.append(score)
                    values.append(p @ v[block])
                    of_rest.append(True)
            scores, of_rest = torch.stack(scores), torch.tensor(of_rest)
            weights = scores.softmax(0)
            out[t], lse[t] = weights @ torch.stack(values), scores.logsumexp(0)
            if plan.rest.order != "zeroth":
                off = q[t] if plan.rest.centre == "key" else q[t] - q[mine].mean(0)
                out[t] += weights[of_rest].sum() * SCALE * off @ slope
    return out, lse


def mean_squares(x, counted, blocks):
    """w or u of `Rest`, as it is written: over the blocks of the first `counted` tokens."""
    off = [x[block] - x[block].mean(0) for block in blocks if block and max(block) < counted]
    return torch.cat(off).square().mean(0)


def smooth(shape, g, sharpness=1.0):
    """Numbers that change slowly from token to token."""
    B, H, N, D = shape
    noise = torch.randn(B * H * D, 1, N + 8, generator=g, dtype=torch.float64)
    mean = F.conv1d(noise, torch.full((1, 1, 9), 1 / 3, dtype=torch.float64))
    return sharpness * mean.view(B, H, D, N).mT


def dense(q, k, v, scale=SCALE):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class TestMeaning:
    """Of the reference, in fp64, and of torch alone beside `gather`."""

    @pytest.fixture
    def given(self):
        g = torch.Generator().manual_seed(0)
        return [torch.randn(2, 2, 128, 8, generator=g, dtype=torch.float64) for _ in range(3)]

    @staticmethod
    def equal_in_blocks(x, block=16):
        return x[:, :, ::block].repeat_interleave(block, 2)

    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    @pytest.mark.parametrize("centre", ["query", "key"])
    def test_it_is_exact_where_the_keys_of_a_block_are_equal(self, centre, kernel, given):
        q, k, v = given
        k = self.equal_in_blocks(k)
        out, lse = by(kernel, whole(rest=Rest(centre)))(q, k, v)
        torch.testing.assert_close(out, dense(q, k, v))
        torch.testing.assert_close(lse, (SCALE * q @ k.mT).logsumexp(-1))

    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    def test_around_queries_it_is_exact_where_those_of_a_block_are_equal(self, kernel, given):
        q, k, v = given
        q = self.equal_in_blocks(q)
        out, lse = by(kernel, whole(rest=Rest("query")))(q, k, v)
        torch.testing.assert_close(out, dense(q, k, v))
        torch.testing.assert_close(lse, (SCALE * q @ k.mT).logsumexp(-1))
        around_keys, _ = by(kernel, whole(rest=Rest("key")))(q, k, v)
        assert (around_keys - out).abs().max() > 0.01

    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    @pytest.mark.parametrize("centre", ["query", "key"])
    def test_values_that_are_all_equal_come_out(self, centre, kernel, given):
        q, k, v = given
        v = v[:, :, :1].expand_as(v)
        out, _ = by(kernel, whole(rest=Rest(centre)))(q, k, v)
        torch.testing.assert_close(out, v)

    @pytest.mark.parametrize("asked", RESTS)
    @pytest.mark.parametrize("kernel", ["reference", *HELD])
    def test_where_all_is_kept_it_changes_no_bit(self, kernel, asked, qkv):
        plan = ragged(RESTS[asked], heads=2)
        plan.keep |= True
        inputs = [x.cpu() for x in qkv(plan.tokens)]
        with_one, without = by(kernel, plan)(*inputs), by(kernel, plan.kept)(*inputs)
        assert all(torch.equal(*x) for x in zip(with_one, without, strict=True))

    @pytest.mark.parametrize("asked", RESTS)
    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    def test_two_samples_are_twice_one(self, kernel, asked, given):
        run = by(kernel, whole(rest=RESTS[asked]))
        together = run(*given)
        for i in range(2):
            alone = run(*(x[i : i + 1] for x in given))
            for one, both in zip(alone, together, strict=True):
                torch.testing.assert_close(one, both[i : i + 1])

    @pytest.mark.parametrize("asked", RESTS)
    @pytest.mark.parametrize("name", ["whole", "ragged, small query blocks"])
    def test_the_reference_is_what_is_written_pair_by_pair(self, name, asked):
        plan = PLANS[name](rest=RESTS[asked])
        g = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, plan.tokens, 4, generator=g, dtype=torch.float64)
        out, lse = by_reference(plan)(q, k, v)
        for head in range(2):
            made = by_hand(q[0, head], k[0, head], v[0, head], plan, head)
            torch.testing.assert_close(out[0, head], made[0])
            torch.testing.assert_close(lse[0, head], made[1])

    def test_pooled_errs_less_than_dropped_and_around_queries_least(self):
        """The median of 200 problems, in which queries and keys change slowly from token to
        token."""
        g = torch.Generator().manual_seed(0)
        q, k, v = (smooth((200, 1, 96, 8), g, sharpness) for sharpness in (1.5, 1.5, 1.0))
        blocks = torch.arange(96)
        mass = (SCALE * q @ k.mT).softmax(-1).unflatten(3, (-1, 8)).sum(-1)
        mass = mass.unflatten(2, (-1, 8)).sum(3)
        keep = torch.zeros(mass.shape, dtype=torch.bool).scatter(3, mass.topk(4).indices, True)
        errors = {}
        for name, one in {"dropped": None, "key": Rest("key"), "query": Rest("query")}.items():
            out = reference.kernel.forward(
                q, k, v, Plan(blocks, keep, 8, 8, rest=one), scale=SCALE
            )
            errors[name] = (out - dense(q, k, v)).flatten(1).norm(dim=1).median().item()
        assert errors["query"] < 0.7 * errors["key"]
        assert errors["key"] < 0.7 * errors["dropped"]


class TestGradients:
    """Of finite differences, in fp64."""

    @pytest.fixture
    def plan(self):
        """19 tokens in 24 slots; a row that keeps all, and one that keeps nothing."""
        slots = torch.full((24,), -1)
        held = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:19]
        slots[held.sort().values] = torch.arange(19)
        keep = torch.zeros(1, 2, 6, 3, dtype=torch.bool)
        keep[:, :, 1], keep[:, 0, 3, 2], keep[:, 1, 4, :2] = True, True, True
        return Plan(slots, keep, 4, 8)

    @staticmethod
    def leaves(count, *shape):
        g = torch.Generator().manual_seed(0)
        made = torch.randn(count, *shape, generator=g, dtype=torch.float64)
        return [x.requires_grad_() for x in made]

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize("asked", RESTS)
    @pytest.mark.parametrize("kernel", ["reference", "gather"])
    def test_of_attention(self, kernel, asked, plan):
        run, fast = by(kernel, with_rest(plan, RESTS[asked])), kernel == "gather"
        assert torch.autograd.gradcheck(run, self.leaves(3, 1, 2, 19, 2), fast_mode=fast)

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize("own", OWN, ids=str)
    @pytest.mark.parametrize("step", [1, 1 << 24], ids="{} numbers at once".format)
    def test_of_what_is_added_in_torch(self, step, own, plan, monkeypatch):
        """In the output and the log-sum-exp that it is added to, too."""
        monkeypatch.setattr(rest, "NUMBERS", step)
        q, k, v, out = self.leaves(4, 1, 2, 19, 2)
        (lse,) = self.leaves(1, 1, 2, 19)

        asked = with_rest(plan, own)

        def run(out, lse, q, k, v):
            curve = curve_of(q, k, asked, SCALE)
            return rest.plain(out, lse, q, k, v, asked, curve, scale=SCALE)

        assert torch.autograd.gradcheck(run, (out, lse, q, k, v), fast_mode=step == 1)

    @pytest.mark.parametrize("own", OWN, ids=str)
    def test_the_backward_pass_is_the_same_inside_of_autocast(self, own, plan, qkv):
        leaves = [x.cpu().requires_grad_() for x in qkv(plan.tokens, batch=1)]
        out, lse = by("gather", with_rest(plan, own))(*leaves)
        asked = partial(torch.autograd.grad, out.square().sum() + lse.sum(), leaves)
        outside = asked(retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = asked()
        assert all(torch.equal(*x) for x in zip(outside, inside, strict=True))


class TestRefusals:
    @pytest.mark.parametrize("options", [{"windows": True}, {"route": True}], ids=str)
    def test_rules_on_token_pairs(self, options):
        with pytest.raises(ValueError, match=r"a rest is for plans of whole blocks: .* got "):
            random_plan("cpu", rest=Rest(), **options)

    def test_a_gain(self):
        with pytest.raises(ValueError, match="a plan with a rest takes no gain on scores"):
            whole(rest=Rest(), gain=torch.full((1, 1, 8, 8), 0.5))
        with pytest.raises(ValueError, match="a plan with a rest takes no gain on scores"):
            whole(rest=Rest()).changed(gain=torch.full((1, 1, 8, 8), 0.5))

    @pytest.mark.parametrize(("order", "own"), ORDERS.items())
    def test_an_order_of_the_other_centre(self, order, own):
        other = "key" if own == "query" else "query"
        words = f"order='{order}' is for centre='{own}', got .*'{other}'"
        with pytest.raises(ValueError, match=words):
            Rest(other, order)

    @pytest.mark.parametrize(("name", "value"), [("centre", "both"), ("order", "third")])
    def test_other_names(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got '{value}'"):
            Rest(**{name: value})

    @pytest.mark.parametrize("lse", [False, True])
    def test_a_kernel_that_gives_no_log_sum_exp(self, lse, monkeypatch, qkv):
        monkeypatch.setattr(gather.Gather, "forward_lse", Kernel.forward_lse)
        inputs = [x.cpu() for x in qkv(128)]
        words = "gather: it gives no log-sum-exp" if lse else "gather: it adds no rest"
        run = kernels.run_lse if lse else kernels.run
        with pytest.raises(ValueError, match=words):
            run(*inputs, whole(rest=None if lse else Rest()), scale=SCALE, kernel="gather")

    def test_forward_mode(self, qkv):
        q, k, v = (x.cpu().double() for x in qkv(128))
        plan = whole(rest=Rest())
        run = partial(kernels.run, k=k, v=v, plan=plan, scale=SCALE)
        with pytest.raises(ValueError, match=r"gather: it has no forward-mode derivative"):
            torch.func.jvp(partial(run, kernel="gather"), (q,), (q,))
        out, way = torch.func.jvp(run, (q,), (q,))
        close = (run(1.0001 * q) - run(0.9999 * q)) / 2e-4
        torch.testing.assert_close(way, close, rtol=1e-5, atol=1e-6)
        assert out.shape == q.shape


@pytest.mark.parametrize("kernel", ["reference", *TRAINED])
def test_a_compiled_function_runs_it_as_it_is(kernel, qkv):
    """Between two graphs, forward and backward."""
    plan = ragged(Rest(), heads=2)

    def plain(q, k, v):
        out, lse = by_reference(plan)(q * 2, k, v)
        return out.cos(), lse * 2

    @torch.compile(backend="aot_eager")
    def inside(q, k, v):
        out, lse = by(kernel, plan)(q * 2, k, v)
        return out.cos(), lse * 2

    assert_answers_no_worse(inside, plain, [x.cpu() for x in qkv(plan.tokens)])


@pytest.mark.parametrize(
    ("kernel", "order", "name"),
    [
        ("gather", ["gather"], "gather"),
        ("auto", ["gather"], "auto"),
        ("auto", ["routed", "gather"], "gather"),  # which takes no plan of whole blocks
    ],
)
def test_the_name_that_was_asked_for_says_what_adds_the_rest(
    kernel, order, name, monkeypatch, qkv
):
    """But where its first choice is passed over: the rest might be of that."""
    told = []
    added = rest.added
    monkeypatch.setattr(
        rest, "added", lambda *x, **facts: (told.append(facts["kernel"]), added(*x, **facts))[1]
    )
    monkeypatch.setattr(kernels, "preference", lambda facts: dict.fromkeys(order, ""))
    plan = whole(rest=Rest())
    kernels.run(*(x.cpu() for x in qkv(128)), plan, scale=SCALE, kernel=kernel)
    assert told == [name]
