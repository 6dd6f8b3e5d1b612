"""No argument of an operator in C++ reads or writes elsewhere, or leaves a result unset."""

import itertools

import pytest
import torch
from support.problems import random_plan

from gen_accel.kernels import int8, native
from gen_accel.kernels.native import curve as _curve
from gen_accel.kernels.native import linear as _linear
from gen_accel.kernels.native import rest as _rest
from gen_accel.kernels.native import selection as _selection
from gen_accel.plan import Plan, Route

pytestmark = pytest.mark.usefixtures("poison", "native_kernel", "int8_kernel")

B, H, N, D, S, BQ, BK, C = 2, 3, 60, 16, 64, 16, 8, 5
KQ, KK = S // BQ, S // BK
LONG, BIG = torch.int64, 1 << 40
OPS = torch.ops.gen_accel
MADE_BY = _curve, _linear, _rest, _selection


def rows(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def slots():
    held = torch.full((S,), -1)
    held[:N] = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return held


def qkv():
    return {name: rows(B, H, N, D) for name in "qkv"}


def lists(**more):
    index = torch.arange(3, dtype=torch.int32).expand(B, 1, KQ, 3).contiguous()
    counts = torch.tensor([3, 1])[:, None, None, None].expand(2, B, 1, KQ).contiguous()
    given = {"slots": slots(), "index": index, "counts": counts, "rule": [rows(S)], "gain": None}
    return given | {"block_q": BQ, "block_k": BK, "scale": 0.3} | more


def routed():
    picks = torch.ones(1, H, S, C, dtype=torch.bool)
    none = torch.zeros(0, dtype=LONG)
    return lists(index=none, counts=none, rule=[rows(S), picks, torch.arange(KK) % C])


def windows():
    return lists(rule=[rows(S), *(rows(3, S) for _ in range(3))], gain=rows(1, H, KQ, KK))


def backward():
    stats = rows(2, B, H, N)
    given = {"grad": rows(B, H, N, D), "of_lse": rows(B, H, N), **qkv()}
    return given | {"out": rows(B, H, N, D), "stats": stats} | lists()


def rest():
    keep = torch.eye(KQ, dtype=torch.bool).repeat_interleave(BQ // BK, 1)[None, None]
    given = {"out": rows(B, H, N, D), "lse": rows(B, H, N), **qkv()}
    given |= {"rise": rows(B, H, N), "weight": rows(B, H, D), "slots": slots(), "keep": keep}
    sizes = {"block_q": BQ, "block_k": BK, "around_queries": True, "factor": 0.1, "scale": 0.3}
    return given | sizes


def rest_backward():
    given = {"grad": rows(B, H, N, D), "of_total": rows(B, H, N)}
    given |= {"joint": rows(B, H, N, D), "total": rows(B, H, N)}
    return given | {"slope": rows(B, H, D, D), "shares": rows(B, H, N)} | rest()


def curve():
    given = {"q": rows(B, H, N, D), "k": rows(B, H, N, D), "of_q": rows(B, H, KQ)}
    given |= {"of_k": rows(B, H, KK), "slots": slots(), "count": S}
    return given | {"block_q": BQ, "block_k": BK, "scale": 0.3}


def curve_backward():
    given = {"of_rise": rows(B, H, N)}
    return given | {x: rows(B, H, D) for x in ("of_weight", "weight", "by")} | curve()


def linear():
    sets = torch.ones(B, H, KQ, KK, dtype=torch.bool)
    sizes = {"block_q": BQ, "block_k": BK, "feature_map": 0, "eps": 1e-6}
    return {**qkv(), "slots": slots(), "sets": sets, **sizes}


def linear_added():
    return linear() | {"weight": rows(D, D), "bias": rows(D), "base": rows(B, H, N, D)}


def spread():
    given = {"query_means": rows(B, H, KQ, D), "k": rows(B, H, N, D), "slots": slots()}
    return given | {"count": S, "block": BK, "scale": 0.3}


def sums():
    return {"x": rows(B, H, N, D), "slots": slots(), "block": BK}


def picks():
    given = {"rows": rows(B, H, N, D), "slots": slots(), "home": torch.arange(S) % C}
    given |= {"means": rows(B, H, C, D), "block": BK}
    return given | {"scope": 0, "topk": 2, "threshold": 0.0}


CASES = {
    "attention": (OPS.native_attention, lambda: qkv() | lists(wide=False)),
    "windows": (OPS.native_attention, lambda: qkv() | windows() | {"wide": False}),
    "routed": (OPS.native_attention, lambda: qkv() | routed() | {"wide": False}),
    "backward": (OPS.native_attention_backward, backward),
    "int8": (OPS.native_int8, lambda: qkv() | lists(wide=False)),
    "int8 routed": (OPS.native_int8, lambda: qkv() | routed() | {"wide": False}),
    "rest": (OPS.native_rest, rest),
    "rest backward": (OPS.native_rest_backward, rest_backward),
    "curve": (OPS.native_curve, curve),
    "curve backward": (OPS.native_curve_backward, curve_backward),
    "linear": (OPS.native_linear, linear),
    "linear backward": (
        OPS.native_linear_backward,
        lambda: {"grad": rows(B, H, N, D), **linear()},
    ),
    "linear added": (OPS.native_add_projected_linear, linear_added),
    "spread": (OPS.native_spread, spread),
    "sums": (OPS.native_block_sums, sums),
    "picks": (OPS.native_picks, picks),
}
# What points into other tensors, and what it may not hold: out of range on either side.
POINTING = {
    "slots": (-5, N, BIG),
    "index": (-1, KK, 1 << 30),
    "counts": (-1, 4, BIG),
    "home": (-1,),
}
# Numbers that are sizes or choose.
SIZES = {"block_q": (0, -16, 48), "block_k": (0, -8, 48), "block": (0, -8, 48), "count": (0, 56)}
SIZES |= {"feature_map": (-1, 3), "scope": (-1, 4), "topk": (-1, C + 1)}


def hurt():
    """Name, argument and what it becomes: every tensor too short along each axis and of another
    type, every number that points or counts out of its range."""
    for name, (_, make) in CASES.items():
        for argument, x in make().items():
            if isinstance(x, torch.Tensor) and x.numel():
                yield from ((name, argument, f"short {axis}") for axis in range(x.ndim))
                yield name, argument, "type"
            if isinstance(x, list):
                for i, one in enumerate(x):
                    yield from ((name, argument, f"{i} short {axis}") for axis in range(one.ndim))
            yield from ((name, argument, value) for value in SIZES.get(argument, ()))
            if isinstance(x, torch.Tensor) and x.numel():
                yield from ((name, argument, value) for value in POINTING.get(argument, ()))


def shorter(x, axis):
    return x.narrow(axis, 0, x.shape[axis] - 1).contiguous()


def changed(x, how):
    match how, x:
        case "type", _:
            whole = LONG if x.dtype == torch.int32 else torch.int32
            return x.to(torch.float64 if x.is_floating_point() else whole)
        case str(), list():
            i, _, axis = how.split()
            return [shorter(one, int(axis)) if n == int(i) else one for n, one in enumerate(x)]
        case str(), _:
            return shorter(x, int(how.split()[1]))
        case int(), torch.Tensor():
            x = x.clone()
            x.view(-1)[0] = how
            return x
    return how


@pytest.mark.parametrize("name", CASES)
def test_whatever_points_or_counts_elsewhere_is_refused(name):
    op, make = CASES[name]
    op(**make())
    for _, argument, how in (case for case in hurt() if case[0] == name):
        if may_fit(name, argument, how):
            continue
        with pytest.raises((ValueError, RuntimeError)) as caught:
            op(**make() | {argument: changed(make()[argument], how)})
        assert isinstance(caught.value, ValueError), (argument, how, caught.value)


def may_fit(name, argument, how):
    """What is no fault: a list may be longer than it is used, and types are cast."""
    fits = {
        ("index", "short 3"),  # as long as its longest row, which `counts` tells
        ("query_means", "short 2"),
        ("query_means", "type"),
        ("grad", "type"),
        ("weight", "type"),
        ("bias", "type"),
        ("rule", "1 short 3"),  # fewer groups
        ("means", "short 2"),
        *(("x", f"short {axis}") for axis in (0, 1, 3)),
    }
    return (argument, how) in fits and not (argument == "weight" and "linear" not in name)


def test_every_operator_is_here():
    known = {str(op).split(".")[1] for op, _ in CASES.values()}
    ours = [name for name in torch._C._dispatch_get_all_op_names() if "gen_accel::" in name]
    assert known == {name.split("::")[1] for name in ours if "::native_" in name}


@pytest.mark.parametrize("kernel", [native, int8])
def test_a_plan_of_other_tokens_is_refused(kernel, qkv):
    for plan in (
        random_plan(torch.device("cpu")),
        Plan(torch.arange(8000), torch.ones(1, 1, 80, 80, dtype=torch.bool), 100, 100),
    ):
        q, k, v = qkv(plan.tokens)
        for tokens in (50, plan.tokens - 1):
            short = [x[:, :, :tokens].contiguous() for x in (q, k, v)]
            with pytest.raises(ValueError, match=r"slots must|a slot must"):
                kernel.forward(*short, plan, scale=0.3)


def test_groups_that_are_not_there_are_refused(qkv):
    picks = torch.ones(1, 1, 64, 3, dtype=torch.bool)
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for group in (-1, 3, BIG):
        plan = Plan(
            torch.arange(64), keep, 16, 16, Route(picks, torch.tensor([0, 1, 2, group]), 16)
        )
        with pytest.raises(ValueError, match="the group of a key block must be from 0 to 2"):
            native.forward(*qkv(64), plan, scale=0.3)


@pytest.mark.parametrize("scope", range(4))
def test_many_samples_pick_what_each_picks(scope):
    """They are shared out whole, one to a thread, where few are worked off by all together."""
    before = torch.get_num_threads()
    given = picks() | {"scope": scope, "rows": rows(12, H, N, D), "means": rows(12, H, C, D)}
    try:
        torch.set_num_threads(2)
        for choice in ({"topk": 2}, {"topk": 0, "threshold": 0.4}):
            found = OPS.native_picks(**given | choice)
            for i, one in itertools.product(range(12), range(2)):
                alone = given | choice | {x: given[x][i : i + 1] for x in ("rows", "means")}
                assert torch.equal(found[one][i : i + 1], OPS.native_picks(**alone)[one])
    finally:
        torch.set_num_threads(before)
