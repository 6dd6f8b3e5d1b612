"""The obligations of every operator in C++, over the table of `support.native_ops`.

No argument reads or writes elsewhere, or leaves a result unset; the rules of torch; tensors read
where they lie; any number of threads.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from support.native_ops import CASES, OPS, Sizes, operators, picks
from support.native_values import Case
from support.problems import random_plan

from gen_accel.kernels import native
from gen_accel.kernels.native import int8
from gen_accel.plan import Plan, Route

pytestmark = pytest.mark.usefixtures("poison", "native_kernel", "int8_kernel")

GOOD, BIG = Sizes(), 1 << 40


@pytest.fixture
def threads():
    """Sets the number of threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# What points into other tensors, and what it may not hold: out of range on either side.
POINTING = {
    "slots": (-5, GOOD.N, BIG),
    "index": (-1, GOOD.Kk, 1 << 30),
    "counts": (-1, 4, BIG),
    "home": (-1,),
}
# Numbers that are sizes or choose.
SIZES = {"block_q": (0, -16, 48), "block_k": (0, -8, 48), "block": (0, -8, 48), "count": (0, 56)}
SIZES |= {"feature_map": (-1, 3), "scope": (-1, 4), "topk": (-1, GOOD.C + 1)}


# What may be missing.
OPTIONAL = ("gain", "of_lse", "sets")


def hurt(given):
    """Argument and what it becomes, as in `changed`: every tensor missing, without memory, of
    another type, of more axes or none, too short along each; every number that points or counts
    out of its range."""
    for argument, x in given.items():
        yield from ((argument, value) for value in SIZES.get(argument, ()))
        places = enumerate(x) if isinstance(x, list) else [("", x)]
        for place, one in places:
            if not isinstance(one, torch.Tensor) or not one.numel():
                continue
            name = f"{argument} {place}".strip()
            yield from ((name, how) for how in (*HOSTILE, other_type(one)))
            if not isinstance(x, list):  # of which torch refuses it by itself
                yield name, "none"
            yield from ((name, f"shorter {axis}") for axis in range(one.ndim))
            yield from ((name, f"put {value}") for value in POINTING.get(argument, ()))


HOSTILE = ("sparse", "more 0", "alone 0")


def other_type(x):
    if x.is_floating_point():
        return "type float64"
    return "type int64" if x.dtype == torch.int32 else "type int32"


@pytest.mark.parametrize("name", CASES)
def test_whatever_points_or_counts_elsewhere_is_refused(name):
    op, make = CASES[name]
    given = make(GOOD)
    op(**given)
    for change in hurt(given):
        if may_fit(name, *change):
            continue
        with pytest.raises((ValueError, RuntimeError)) as caught:
            Case(name, GOOD, (change,))()
        assert isinstance(caught.value, ValueError), (change, caught.value)


def may_fit(name, argument, how):
    """What is no fault: a list may be longer than it is used, and types are cast."""
    fits = {
        ("counts", "put 4") if name == "choosing" else None,
        ("counts", "none") if name == "choosing" else None,  # then blocks are given
        ("index", "shorter 3"),  # as long as its longest row, which `counts` tells
        ("query_means", "shorter 2"),
        ("query_means", "type float64"),
        ("grad", "type float64"),
        ("weight", "type float64"),
        ("bias", "type float64"),
        ("rule 1", "shorter 3"),  # fewer groups
        ("means", "shorter 2"),
        *(("x", f"shorter {axis}") for axis in (0, 1, 3)),
        *((x, "none") for x in OPTIONAL),
    }
    return (argument, how) in fits and not (argument == "weight" and "linear" not in name)


# What the sanitizers of tests/fuzz/test_sanitized.py found, and what their cases came to before.
FOUND = (
    Case("routed", replace(GOOD, C=0)),
    Case("kept", GOOD, (("keep", "empty 3"), ("whole", "empty 3"))),
    Case("attention", GOOD, (("rule", "none"),)),
    Case("curve", GOOD, (("slots", "none"),)),
    Case("spread", GOOD, (("slots", "none"), ("count", BIG))),
    Case("sums", replace(GOOD, N=1), (("x", "empty 2"), ("slots", "fill -1"))),
)


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.name)
def test_what_was_found_is_refused(case):
    with pytest.raises(ValueError, match=r"must|takes|a rule has"):
        case()


def test_no_samples_and_vast_scales_are_no_fault():
    index, counts = Case("kept", replace(GOOD, B=0, seed=1))()
    assert index.shape == (0, 1, GOOD.Kq, 1)
    assert counts.shape == (2, 0, 1, GOOD.Kq)
    rise, _, _ = Case("curve", GOOD, (("scale", "1e308"),))()
    assert rise.shape == GOOD.tokens


TRUTHS = ("rest", "keep"), ("linear", "sets"), ("routed", "rule 1"), ("kept", "keep")


@pytest.mark.parametrize(("name", "argument"), TRUTHS, ids=lambda x: x)
def test_any_byte_but_0_is_true(name, argument):
    one, other = (Case(name, GOOD, ((argument, f"fill {x}"),))() for x in (1, 2))
    assert_same(one, other)


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# Operators, not functions, and those among them that have a gradient.
REGISTERED = [name for name in CASES if name != "kept"]
DIFFERENTIATED = ("attention", "windows", "routed", "rest", "curve", "linear")


@pytest.mark.turns(3)
@pytest.mark.parametrize("seed", [0, 127])
@pytest.mark.parametrize("name", REGISTERED)
def test_it_obeys_the_rules_of_torch(name, seed):
    op, make = CASES[name]
    given, checks = make(replace(GOOD, seed=seed)), ["test_schema", "test_faketensor"]
    if name in DIFFERENTIATED:
        checks.append("test_autograd_registration")
        given |= {x: given[x].requires_grad_() for x in "qkv" if x in given}
    torch.library.opcheck(op, (), given, test_utils=checks)


def results(name, sizes, changes=()):
    """What a call returns, or writes in place."""
    given = Case(name, sizes, tuple(changes)).arguments()
    made = CASES[name][0](**given)
    return given["base"] if made is None else made


@pytest.mark.parametrize("layout", ["turned", "apart", "offset", "reversed"])
@pytest.mark.parametrize("name", CASES)
def test_it_reads_tensors_where_they_lie(name, layout):
    for sizes in (GOOD, replace(GOOD, dtype="bfloat16", seed=88)):
        changes = []
        for argument, x in CASES[name][1](sizes).items():
            places = enumerate(x) if isinstance(x, list) else [("", x)]
            if argument != "base":  # which is written, and must be contiguous
                tensors = (i for i, one in places if isinstance(one, torch.Tensor))
                changes += [(f"{argument} {i}".strip(), layout) for i in tensors]
        assert_same(results(name, sizes, changes), results(name, sizes))


# Sums of gradients are added up in an order that depends on the number of threads alone.
SUMMED = ("backward", "windows backward", "routed backward", "rest backward", "linear backward")


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_answer(name, threads):
    sizes = Sizes(B=1, N=500, S=512, block_q=8, block_k=16, C=16, most=6)
    threads(3 if name in SUMMED else 1)
    wanted = results(name, sizes)
    threads(3)
    assert_same(results(name, sizes), wanted)


def test_every_operator_is_here():
    known = {str(op).rpartition(".")[2] for op, _ in CASES.values() if "gen_accel." in str(op)}
    assert known == operators()


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
                kernel.kernel.forward(*short, plan, scale=0.3)


def test_groups_that_are_not_there_are_refused(qkv):
    picks = torch.ones(1, 1, 64, 3, dtype=torch.bool)
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for group in (-1, 3, BIG):
        plan = Plan(
            torch.arange(64), keep, 16, 16, Route(picks, torch.tensor([0, 1, 2, group]), 16)
        )
        with pytest.raises(ValueError, match="the group of a key block must be from 0 to 2"):
            native.kernel.forward(*qkv(64), plan, scale=0.3)


@pytest.mark.turns(3)
@pytest.mark.parametrize("scope", range(4))
def test_many_samples_pick_what_each_picks(scope, threads):
    """They are shared out whole, one to a thread, where few are worked off by all together."""
    given = picks(Sizes(B=12)) | {"scope": scope}
    threads(2)
    for choice in ({"topk": 2}, {"topk": 0, "threshold": 0.4}):
        found = OPS.native_picks(**given | choice)
        for i, one in itertools.product(range(12), range(2)):
            alone = given | choice | {x: given[x][i : i + 1] for x in ("rows", "means")}
            assert torch.equal(found[one][i : i + 1], OPS.native_picks(**alone)[one])
