"""Mixed attention: each layer, head and step by its own method."""

import pytest
import torch
from support.checks import assert_no_worse
from support.methods import MIXTURE, RADIAL, SPARSE, WINDOW
from support.wan import GRID, HEADS, LAYERS, generate, pipeline

from gen_accel import Dense, Piecewise, Reuse, Schedule, VideoShape, attach, kernels
from gen_accel.attention_processors.methods.mixed import Mixed, MixedHeads, Rule, merged
from gen_accel.functional import attention
from gen_accel.kernels import Runner
from gen_accel.method import Method, Step
from gen_accel.plan import joined

pytestmark = [pytest.mark.usefixtures("one_thread")]
VIDEO = VideoShape(4, 6, 7, text=5)
FIRST, SECOND = (Piecewise(share, block_q=16, block_k=16) for share in (0.2, 0.5))
BOX = Piecewise(0.2, block_q=16, block_k=16, tile=(4, 2, 2))


def qkv(heads=4, dtype=torch.float32, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = batch, heads, VIDEO.tokens, 16
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))


def heads_of(*some):
    return MixedHeads(some)


def counting(kernel="reference"):
    """A runner, and the plans that it ran."""
    ran = []

    def run(q, k, v, plan):
        ran.append((plan, q.shape[1]))
        return kernels.run(q, k, v, plan, scale=0.25, kernel=kernel)

    return Runner(run, kernel, 0.25), ran


@pytest.mark.parametrize("kernel", ["reference", "gather"])
@pytest.mark.parametrize(
    ("some", "launches"),
    [
        ([(FIRST, (0, 2)), (SECOND, (1, 3))], 1),
        ([(FIRST, (1,)), (SECOND, (3,))], 1),  # dense heads take the layout of the others
        ([(FIRST, (0,)), (BOX, (1, 2)), (SECOND, (3,))], 2),
        ([(RADIAL, (0, 1)), (FIRST, (2, 3))], 2),
        ([(WINDOW, (2,)), (MIXTURE, (0,)), (RADIAL, (1,))], 3),
        ([(RADIAL, (3,)), (Dense(), None)], 1),
    ],
    ids=str,
)
def test_each_head_is_computed_by_its_method_alone(some, launches, kernel):
    exact = qkv(dtype=torch.float64)
    low = tuple(x.float() for x in exact)
    mixed = heads_of(*some)
    run, ran = counting(kernel)
    out = mixed(*low, video=VIDEO, kernel=run)
    assert len(ran) == launches
    for head in range(4):
        own = mixed.method_of(head)
        one = [x[:, head : head + 1] for x in low]
        alone = own(*one, video=VIDEO, kernel=counting(kernel)[0])
        plan = own(*one, video=VIDEO, kernel=Runner(lambda *call: call[3], kernel, 0.25))
        best = kernels.run(*(x[:, head : head + 1] for x in exact), plan, scale=0.25)
        assert_no_worse(out[:, head : head + 1], alone, best)


def test_heads_that_share_a_layout_are_one_launch_of_their_density():
    run, ran = counting()
    heads_of((FIRST, (0,)), (SECOND, (2,)))(*qkv(), video=VIDEO, kernel=run)
    ((plan, heads),) = ran
    assert heads == 4
    own = [heads_of((one, None))(*qkv(), video=VIDEO, kernel=counting()[0]) for one in (FIRST,)]
    assert own[0].shape == qkv()[0].shape
    shares = plan.keep.float().mean((0, 2, 3))
    assert shares[1] == shares[3] == 1
    assert shares[0] < shares[2] < 1


def test_gradients_equal_the_gradients_of_each_head_alone():
    low, exact = qkv(), qkv(dtype=torch.float64)
    mixed = heads_of((FIRST, (0, 3)), (RADIAL, (1,)))
    grads = []
    for given in (low, exact):
        inputs = [x.clone().requires_grad_() for x in given]
        out = mixed(*inputs, video=VIDEO, kernel=counting()[0])
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    alone = [x.clone().requires_grad_() for x in low]
    parts = []
    for head in range(4):
        one = [x[:, head : head + 1] for x in alone]
        parts.append(mixed.method_of(head)(*one, video=VIDEO, kernel=counting()[0]))
    of_alone = torch.autograd.grad(torch.cat(parts, 1).square().sum(), alone)
    for got, own, best in zip(grads[0], of_alone, grads[1], strict=True):
        assert_no_worse(got, own, best)


def test_a_method_that_works_on_what_the_kernel_returns_runs_by_itself():
    class Doubled(Method):
        def __call__(self, q, k, v, *, video, kernel):
            return 2 * FIRST(q, k, v, video=video, kernel=kernel)

        def plan(self, video, device):
            return FIRST.plan(video, device)

    run, ran = counting()
    given = qkv()
    out = heads_of((Doubled(), (0, 1)), (FIRST, (2, 3)))(*given, video=VIDEO, kernel=run)
    plain = FIRST(*given, video=VIDEO, kernel=counting()[0])
    torch.testing.assert_close(out[:, :2], 2 * plain[:, :2])
    torch.testing.assert_close(out[:, 2:], plain[:, 2:])
    assert len(ran) == 2


def test_one_method_for_all_heads_is_that_method_bit_for_bit():
    pipe, options = pipeline(), {"kernel": "gather", "padding_once": False}
    with attach(pipe, FIRST, schedule=Schedule(dense_steps=1), **options):
        alone = generate(pipe, 3)
    rules = Rule(Dense(), steps=(0, 1)), Rule(FIRST, heads=tuple(range(HEADS)))
    with attach(pipe, Mixed(rules, 3), **options) as handle:
        mixed = generate(pipe, 3)
        summary = handle.summary()
    assert torch.equal(mixed, alone)
    assert "dense by its rules" in handle.explain(step=0)
    assert "dense" not in str(summary.method).splitlines()[0][:5]


def test_rules_decide_by_layer_head_and_step():
    pipe = pipeline()
    rules = (
        Rule(RADIAL, layers=(0,), steps=(1, 3)),
        Rule(FIRST, layers=(1,), heads=(1,), steps=(2, 3)),
    )
    with attach(pipe, Mixed(rules, 3), kernel="gather") as handle:
        generate(pipe, 3)
    found = {
        (name.split(".")[2], step): record.density
        for (name, step), record in handle.records.items()
        if record.why_dense is None
    }
    video = VideoShape(*GRID)
    assert sorted(found) == [("0", 1), ("0", 2), ("1", 2)]
    assert found["0", 1] == pytest.approx(RADIAL.density(video))
    assert 0.5 < found["1", 2] < 1


def test_the_density_is_the_mean_over_layers_heads_and_steps():
    video = VideoShape(*GRID)
    rules = (
        Rule(Dense(), layers=(0, 1), heads=(0, 1), steps=(0, 1)),
        Rule(RADIAL, layers=(0, 1), heads=(0,), steps=(1, 4)),
    )
    own = RADIAL.density(video)
    assert Mixed(rules, 4).density(video) == pytest.approx((10 + 6 * own) / 16)


def test_a_process_of_some_heads_counts_them_in_the_whole_layer():
    mixed = heads_of((FIRST, (0,)), (SECOND, (2,)))
    held = mixed.for_heads(slice(2, 4))
    assert held.groups(2) == ((SECOND, (0,)), (Dense(), (1,)))
    assert FIRST.for_heads(slice(0, 2)) is FIRST


@pytest.mark.parametrize("name", SPARSE)
def test_every_method_can_be_ruled(name):
    rule = Rule(SPARSE[name], heads=(0, 2))
    step = Mixed((rule,), 2).for_layer(0).at(Step(1, 2))
    out = step(*qkv(), video=VIDEO, kernel=counting("gather")[0])
    assert out.isfinite().all()


def test_without_a_model_it_is_the_first_step_of_the_first_layer():
    given = qkv()
    mixed = Mixed((Rule(FIRST, layers=(0,), steps=(0, 1)),), 2)
    torch.testing.assert_close(
        attention(*given, video=VIDEO, method=mixed), attention(*given, video=VIDEO, method=FIRST)
    )


def test_plans_that_are_joined_keep_what_each_kept():
    given = qkv(batch=1)
    plans = [one.plan_for(*given, video=VIDEO) for one in (FIRST, SECOND)]
    assert plans[0].lies_as(plans[1])
    assert not plans[0].lies_as(BOX.plan_for(*given, video=VIDEO))
    halves = [
        one.plan_for(*(x[:, some] for x in given), video=VIDEO)
        for one, some in ((FIRST, slice(0, 4, 2)), (SECOND, slice(1, 4, 2)))
    ]
    plan = joined([((0, 2), halves[0]), ((1, 3), halves[1])], 4)
    assert torch.equal(plan.keep[:, ::2], plans[0].keep[:, ::2])
    assert torch.equal(plan.keep[:, 1::2], plans[1].keep[:, 1::2])
    assert plan.entries == max(one.entries for one in plans)
    assert plan.tokens == VIDEO.tokens


def test_static_plans_are_joined_once():
    mixed = heads_of((RADIAL, (0, 2)))
    run, ran = counting()
    with torch.inference_mode():
        mixed(*qkv(), video=VIDEO, kernel=run)
    given = [x.requires_grad_() for x in qkv()]
    mixed(*given, video=VIDEO, kernel=run).sum().backward()
    assert ran[0][0] is ran[1][0]
    assert ran[0][1] == 4
    assert not ran[0][0].keep.is_inference()
    dynamic = heads_of((FIRST, (0,)), (SECOND, (1, 3)))
    for seed in (0, 1):
        dynamic(*qkv(seed=seed), video=VIDEO, kernel=run)
    assert ran[2][0] is not ran[3][0]
    assert not torch.equal(ran[2][0].keep, ran[3][0].keep)


def test_equal_rules_are_equal_and_hash_alike():
    made = [Mixed((Rule(FIRST, (0,), (1,), (0, 2)),), 3) for _ in range(2)]
    assert made[0] == made[1]
    assert len({*made}) == 1
    layers = [one.for_layer(0) for one in made]
    assert len({*layers}) == 1
    assert layers[0].changes_by == "number"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rule(Reuse(FIRST)), "remembers"),
        (lambda: Rule(Piecewise(select="threshold", tau_end=2.0)), "changes"),
        (lambda: Rule(FIRST, layers=()), "layers"),
        (lambda: Rule(FIRST, heads=(0, 0)), "heads"),
        (lambda: Rule(FIRST, heads=(-1,)), "heads"),
        (lambda: Rule(FIRST, steps=(2, 2)), "first < end"),
        (lambda: Rule(FIRST, steps=(2, 2.5)), "steps"),
        (lambda: Mixed((), 3), "one Rule or more"),
        (lambda: Mixed((FIRST,), 3), "one Rule or more"),
        (lambda: Mixed((Rule(FIRST),), 0), "steps"),
        (lambda: Mixed((Rule(FIRST, steps=(0, 5)),), 4), "of 4 steps"),
    ],
)
def test_rules_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_run_of_another_number_of_steps_is_refused_with_what_solves_it_anew():
    pipe = pipeline()
    with (
        attach(pipe, Mixed((Rule(FIRST),), 5), kernel="gather"),
        pytest.raises(ValueError, match=r"5 steps, this run has 3.*gen-accel tune .*--steps 3"),
    ):
        generate(pipe, 3)


def test_layers_that_a_model_lacks_are_refused():
    rules = (Rule(FIRST, layers=(LAYERS,)),)
    with pytest.raises(ValueError, match="layers of Mixed"):
        attach(pipeline(), Mixed(rules, 3))


def test_densities_of_heads_are_chosen_at_once_as_they_are_apart():
    given = qkv(8)
    shares = (0.1, 0.5, 0.2, 0.1, 1.0, 0.3, 0.2, 0.7)
    methods = tuple(Piecewise(share, block_q=16, block_k=16, sink=1) for share in shares)
    one = methods[0].together(methods)
    assert one is not None
    plan = one.plan_for(*given, video=VIDEO)
    for head, method in enumerate(methods):
        own = method.plan_for(*(x[:, head : head + 1] for x in given), video=VIDEO)
        assert torch.equal(plan.keep[:, head : head + 1], own.keep)
        assert plan.entries >= own.entries
    mixed = heads_of(*((method, (head,)) for head, method in enumerate(methods)))
    ((made, heads),) = merged(mixed, 8)
    assert made == one
    assert heads == tuple(range(8))


@pytest.mark.parametrize(
    "other",
    [
        Piecewise(0.5, block_q=16, block_k=16, score="mean"),
        Piecewise(0.5, block_q=16, block_k=8),
        Piecewise(0.5, block_q=16, block_k=16, budget="head"),
        Piecewise(select="threshold", block_q=16, block_k=16),
    ],
)
def test_methods_that_differ_by_more_are_chosen_apart(other):
    assert FIRST.together((FIRST, other)) is None
    assert len(merged(heads_of((FIRST, (0,)), (other, (1,)), (SECOND, (2, 3))), 4)) == 2
