"""The choice of settings, held to brute force, and the profile that it reads."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from gen_accel.pipelines.tuning.preset import Profile, interpolated, levels_of
from gen_accel.pipelines.tuning.solving import (
    SolveOptions,
    at_error,
    bounded,
    choose,
    curve,
    frontier,
    point_of,
    steepest,
    within,
)

UNITS, SETTINGS = 4, 3


def problem(seed):
    g = torch.Generator().manual_seed(seed)
    errors, costs = (torch.rand(UNITS, SETTINGS, generator=g, dtype=torch.float64) for _ in "ec")
    return errors, costs


def all_choices(errors, costs):
    """(cost, error) of every choice there is."""
    units = range(len(errors))
    return [
        (
            sum(costs[i, s].item() for i, s in zip(units, some, strict=True)),
            sum(errors[i, s].item() for i, s in zip(units, some, strict=True)),
        )
        for some in product(range(errors.shape[1]), repeat=len(errors))
    ]


@pytest.mark.turns(5)
@pytest.mark.parametrize("seed", range(200))
def test_no_choice_is_cheaper_at_as_small_an_error(seed):
    errors, costs = problem(seed)
    every = all_choices(errors, costs)
    points = frontier(errors, costs, 30)
    for point in points:
        assert point.cost <= min(c for c, e in every if e <= point.error + 1e-12) + 1e-9
    assert points[0].cost == pytest.approx(min(c for c, _ in every))
    assert points[-1].error == pytest.approx(min(e for _, e in every))


@pytest.mark.turns(5)
@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_falls(seed):
    points = frontier(*problem(seed), 30)
    costs, errors = [p.cost for p in points], [p.error for p in points]
    assert costs == sorted({*costs})
    assert errors == sorted({*errors}, reverse=True)


@pytest.mark.turns(5)
@pytest.mark.parametrize("seed", range(50))
def test_a_bound_is_kept_at_the_least_cost_of_the_frontier(seed):
    errors, costs = problem(seed)
    points = frontier(errors, costs, 100)
    for bound in torch.linspace(0.2, 2.5, 9).tolist():
        found = within(errors, costs, bound)
        kept = [p for p in points if p.error <= bound]
        if found is None:
            assert not kept
            continue
        assert found.error <= bound
        assert found.cost <= min(p.cost for p in kept) + 1e-9


def test_both_ends_of_lam():
    errors, costs = problem(0)
    assert torch.equal(choose(errors, costs, 0.0).settings, errors.argmin(1))
    assert torch.equal(choose(errors, costs, steepest(errors, costs)).settings, costs.argmin(1))


def test_equal_errors_take_the_cheapest():
    errors = torch.zeros(2, 3, dtype=torch.float64)
    costs = torch.tensor([[3.0, 1.0, 2.0]] * 2, dtype=torch.float64)
    assert choose(errors, costs, 0.0).settings.tolist() == [1, 1]


def test_a_setting_that_a_unit_cannot_have_is_never_chosen():
    errors, costs = problem(3)
    errors[:, 0] = torch.inf
    assert all((point.settings != 0).all() for point in frontier(errors, costs, 20))


def profile(P=2, S=4, L=3, H=2, C=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    seconds = torch.linspace(0.2, 1.0, C)
    errors = torch.rand(P, S, L, H, C, generator=g) * (1 - seconds)
    return Profile(
        torch.arange(L),
        torch.linspace(1, 0, S + 1),
        errors,
        0.5 + torch.rand(P, S, L, H, generator=g),
        seconds.expand(L, C).contiguous(),
        seconds,
        torch.tensor(0.01),
        torch.arange(S),
        0.1 + torch.rand(P, S, generator=g),
    )


def test_predictions_add_in_quadrature():
    known = profile()
    settings = torch.randint(0, 4, (4, 3, 2), generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(2, dtype=torch.float64)
    for p, s, l, h in product(range(2), range(4), range(3), range(2)):
        share = known.errors[p, s, l, h, settings[s, l, h]] / known.squares[p, s, l].sum()
        wanted[p] += known.weights[p, s].double() ** 2 * share.double()
    torch.testing.assert_close(known.predicted(settings), wanted.sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", ["mean", "even", "worst"])
def test_a_point_keeps_the_error_that_was_asked_for(scale):
    known, options = profile(), SolveOptions(scale=scale)
    for error in (0.3, 0.8):
        point = at_error(known, error, options)
        assert point is not None
        assert bounded(known, point.settings, options) <= error
        if scale == "even":
            continue
        each = known.predicted(point.settings)
        assert (each.max() if scale == "worst" else each.square().mean().sqrt()) <= error + 1e-9


def test_no_prompt_decides_alone():
    known = profile()
    heavy = replace(known, weights=known.weights * torch.tensor([[1e3], [1.0]]))
    even = SolveOptions(scale="even")
    same = at_error(known, 0.5, even)
    other = curve(heavy, even, 200)
    assert same is not None
    assert any(torch.equal(one.settings, same.settings) for one in other)
    # A thousand times the error of one prompt of two: the geometric mean grows.
    scaled, before = (one.unit_errors(scale="even") for one in (heavy, known))
    torch.testing.assert_close(scaled, 1e3 * before)


def test_more_axes_are_never_dearer():
    known = profile()
    for error in (0.3, 0.6):
        few, more = (
            at_error(known, error, SolveOptions(by=by))
            for by in (("steps",), ("steps", "layers", "heads"))
        )
        assert few is not None
        assert more is not None
        assert more.cost <= few.cost + 1e-9


def test_all_dense_costs_one():
    known = profile()
    point = curve(known, SolveOptions())[-1]
    assert (point.settings == 3).all()
    assert (point.cost, point.density) == (pytest.approx(1), pytest.approx(1))
    assert point_of(known, point.settings).predicted == 0


def test_a_profile_at_its_own_noise_is_itself():
    known = profile()
    again = known.at_steps(known.sigmas)
    torch.testing.assert_close(again.errors, known.errors)
    torch.testing.assert_close(again.step_weights(), known.step_weights(), rtol=1e-5, atol=1e-6)
    finer = known.at_steps(torch.linspace(1, 0, 9))
    assert finer.errors.shape == (2, 8, 3, 2, 4)
    # Twice as many steps, each half as long: half the weight.
    torch.testing.assert_close(finer.step_weights()[:, 0], known.step_weights()[:, 0] / 2)


def test_weights_between_levels_follow_the_length_of_the_step():
    known = profile(S=8)
    some = Profile(
        **{
            **vars(known),
            "levels": torch.tensor([0, 7]),
            "weights": known.weights[:, [0, 7]],
        }
    )
    weights = some.step_weights()
    torch.testing.assert_close(weights[:, 0], known.weights[:, 0].double())
    low, high = weights.amin(1), weights.amax(1)
    ends = known.weights[:, [0, 7]].double()
    torch.testing.assert_close(low, ends.amin(1))
    torch.testing.assert_close(high, ends.amax(1))


def test_interpolation_is_linear_and_constant_beyond_its_ends():
    places = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    values = torch.tensor([[4.0, 0.0, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([-1.0, 0.0, 0.5, 1.5, 2.0, 3.0], dtype=torch.float64)
    assert interpolated(places, values, wanted).tolist() == [[0.0, 0.0, 0.5, 2.5, 4.0, 4.0]]
    assert interpolated(places[:1], values[:, :1], wanted).tolist() == [[4.0] * 6]


@pytest.mark.parametrize(("steps", "most"), [(4, 6), (10, 6), (20, 6), (50, 8), (1, 6), (3, 1)])
def test_levels_hold_both_ends(steps, most):
    levels = levels_of(steps, most)
    assert levels == sorted({*levels})
    assert levels[0] == 0
    assert levels[-1] == steps - 1
    assert len(levels) <= max(most, 5)


@pytest.mark.parametrize("name", ["weights", "seconds", "sigmas", "squares"])
def test_tensors_of_other_shapes_are_refused(name):
    tensors = {**vars(profile())}
    tensors[name] = tensors[name][..., :-1]
    with pytest.raises(ValueError, match=f"the profile in here cannot be read: {name}"):
        Profile.of(tensors, "here")
    del tensors[name]
    with pytest.raises(ValueError, match=name):
        Profile.of(tensors, "here")


def test_costs_that_differ_by_a_trifle_leave_the_frontier_whole():
    g = torch.Generator().manual_seed(0)
    costs = torch.tensor([0.1, 0.1 + 1e-9, 0.3, 0.6, 1.0], dtype=torch.float64).expand(200, 5)
    errors = torch.rand(200, 5, generator=g, dtype=torch.float64).sort(descending=True).values
    errors[:, -1] = 0.0
    errors[0] *= 1e4
    found = [one.cost / 200 for one in frontier(errors, costs, 24)]
    assert found[0] == pytest.approx(0.1, abs=0.01)
    assert found[-1] == pytest.approx(1.0)
    assert max(b - a for a, b in pairwise(found)) < 0.1
