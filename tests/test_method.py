"""The contract of a method: every part, its default, and what breaks it."""

from dataclasses import dataclass, field

import pytest
import torch
from support.methods import LINEAR, MIXTURE, RADIAL, WINDOW
from support.wan import forward, transformer
from torch import nn

from gen_accel import BlockMixture, Dense, Method, Neighborhood, VideoShape, attach
from gen_accel.attention_processors import METHODS
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.method import Step, StepState, check_class, check_method, is_silent

VIDEO = VideoShape(3, 5, 7, text=4)
ALL = [*(kind() for kind in METHODS.values()), Full(), RADIAL, WINDOW, MIXTURE, LINEAR]


class Shortest(Method):
    """No dataclass, and no part but a plan, whose device has no default."""

    def plan(self, video, device):
        return RADIAL.plan(video, device)


class Alone(Method):
    """Computes by itself."""

    def __call__(self, q, k, v, *, video, kernel):
        return v.mean(2, keepdim=True).expand_as(v)


def made(**held):
    """An instance of a class that is `Shortest` with these attributes besides."""
    return type("Mine", (Shortest,), held)()


@pytest.mark.parametrize("method", [*ALL, Shortest(), Alone()], ids=lambda m: type(m).__name__)
def test_every_method_keeps_the_contract(method):
    check_method(method)
    assert method.defines("plan") is not isinstance(method, Alone)


def test_a_part_that_is_left_out_is_its_default():
    method = Alone()
    for same in (
        method.for_layer(3),
        method.at(Step(3, 9, 0.5)),
        method.for_heads(slice(1, 2)),
        method.for_device(torch.device("cuda")),
        method.within(VIDEO, VIDEO),
        method.tiled((1, 2, 3)),
    ):
        assert same is method
    assert method.branch(2, 16) is method.step_state() is method.together([method]) is None
    facts = "is_dense", "is_dynamic", "thins_by_time"
    assert not any(getattr(method, fact) for fact in facts)
    assert not any(map(method.defines, ("plan", "plan_for", "for_heads", "branch", "step_state")))
    assert (method.least_grid, method.named_layers, method.tile_tokens) == ((1, 1, 1), (), 0)
    assert method.changes_by == method.needs_all_heads == method.unfit("Model", 0, 2) == ""
    short = Shortest()
    assert short.density(VIDEO) == short.planned(VIDEO).density == RADIAL.density(VIDEO)


def test_what_the_package_knew_by_name_is_said_by_the_methods():
    assert [n for n, kind in METHODS.items() if kind().is_dense] == ["dense"]
    assert Full().is_dense
    assert [n for n, kind in METHODS.items() if kind().thins_by_time] == ["radial"]
    made = {name: kind() for name, kind in METHODS.items()}
    assert [n for n, one in made.items() if one.for_layer(0) != one] == ["block_mixture"]
    assert BlockMixture("2d").for_layer(0) == BlockMixture("2d")
    window = Neighborhood((-1, 3, 4), dilation=(1, 2, 1))
    assert window.least_grid == (1, 6, 4)
    check_plan = window.plan(VideoShape(*window.least_grid))
    assert check_plan.density == pytest.approx(0.5)
    assert BlockMixture(scope="head_global").needs_all_heads == ""
    assert BlockMixture(scope="overall").needs_all_heads.startswith("scope='overall', ")


def test_no_plan_no_density():
    for asked in (Alone().planned, Alone().density):
        with pytest.raises(ValueError, match=r"^Alone has no plan\(video, device\)"):
            asked(VIDEO)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("plans", "plan"),
        ("plan_fr", "plan_for"),
        ("planfor", "plan_for"),
        ("for_layers", "for_layer"),
        ("branches", "branch"),
        ("densitys", "density"),
        ("thinsbytime", "thins_by_time"),
        ("stepstate", "step_state"),
        ("is_dens", "is_dense"),
    ],
)
def test_a_misspelt_part_is_named_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"^no part of .*Mine.{name}; did you mean '{near}'"):
        type("Mine", (Alone,), {name: lambda self, *args: None})


def test_helpers_and_options_may_have_near_names():
    @dataclass(frozen=True)
    class Mine(Shortest):
        """`plans` has `plan` beside it, and `branches` is an option that can be called."""

        branches: type = int

        def plans(self):
            return []

        def _layouts(self):
            return []

    check_method(Mine())


PARTS = [name for name in vars(Method) if not name.startswith("_") and name != "tile_tokens"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_wrong_type_is_named(part):
    with pytest.raises(ValueError, match=f"^{part} of Mine must be .*, got 3$"):
        made(**{part: 3})


@pytest.mark.parametrize(
    ("held", "error"),
    [
        (
            {"needs_all_heads": True},
            "needs_all_heads of Mine must be of type str, such as '', got True",
        ),
        (
            {"least_grid": (3, 3)},
            r"least_grid of Mine must be of type tuple, such as \(1, 1, 1\)",
        ),
        (
            {"plan": lambda self, video: None},
            r"plan of Mine must take \(video, device\), it takes \(video\)",
        ),
        ({"for_layer": lambda self: self}, r"for_layer of Mine must take \(layer\), it takes \("),
        (
            {"plan_for": lambda self, q, k, *, video: None},
            r"plan_for of Mine must take .*video, scale, kernel\), it takes \(q, k, video\)",
        ),
        (
            {"branch": lambda self, heads, dim: nn.Identity()},
            r"__call__ of Mine must take \(q, k, v, \*, video, kernel, branch\)",
        ),
        (
            {"__call__": lambda self, q, k, v: v},
            r"__call__ of Mine must take .*kernel\), it takes",
        ),
    ],
)
def test_what_breaks_the_contract_is_one_line(held, error):
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        made(**held)
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be_hashed_are_refused():
    @dataclass(frozen=True)
    class Mine(Shortest):
        frames: list = field(default_factory=list)

    with pytest.raises(ValueError, match=r"Mine must be hashable.*unhashable type: 'list'"):
        check_method(Mine())
    with pytest.raises(ValueError, match="Mine must be hashable, as an instance of a frozen data"):
        check_method(made(__hash__=None))


@pytest.mark.parametrize("given", [3, None, "radial", object(), [], Shortest, Dense])
def test_what_is_no_method(given):
    with pytest.raises(ValueError, match=r"method must be an instance such as Radial\(\), got"):
        check_method(given)


def test_a_module_and_other_callables_are_no_methods():
    with pytest.raises(ValueError, match=r"got Linear, a module: .* in branch\(heads, dim\)"):
        check_method(nn.Linear(2, 2))
    for call in (print, lambda q, k, v, *, video, kernel: v):
        with pytest.raises(ValueError, match=r"got \w+: derive its class from gen_accel.Method"):
            check_method(call)


def test_classes():
    check_class(Shortest, "mine")
    for kind in (3, dict, nn.Linear, lambda q: q, object, Shortest()):
        with pytest.raises(ValueError, match=r"method 'mine' must be a class derived from gen_a"):
            check_class(kind, "mine")


def test_the_shortest_method_is_attached():
    model = transformer()
    with attach(model, RADIAL):
        exact = forward(model)
    with attach(model, Shortest()) as handle:
        assert torch.equal(forward(model), exact)
    assert handle.summary().density == pytest.approx(RADIAL.density(VideoShape(5, 9, 11)))


def test_a_method_may_do_without_a_kernel():
    model = transformer()
    stock = forward(model)
    with attach(model, Alone()) as handle:
        out = forward(model)
        assert handle.summary().to_dict()["layers"]
    assert not torch.equal(out, stock)
    assert torch.equal(forward(model), stock)


@pytest.mark.slow
def test_no_graph_runs_a_method_without_a_plan():
    model = transformer()
    with attach(model, Alone()):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        with pytest.raises(ValueError, match=r"Alone has no plan\(video, device\), .* uncompiled"):
            forward(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plan", "plan_for", "branch"])
def test_a_graph_runs_a_method_of_ones_own_as_eager_does(kind):
    class Chosen(Shortest):
        def __call__(self, q, k, v, *, video, kernel):
            return kernel(q, k, v, self.plan_for(q, k, video=video))

        def plan_for(self, q, k, *, video, scale=None, kernel="auto"):
            return LINEAR.plan_for(q, k, video=video, scale=scale, kernel=kernel)

    class Trained(Shortest):
        def __call__(self, q, k, v, *, video, kernel, branch=None):
            return branch(super().__call__(q, k, v, video=video, kernel=kernel))

        def branch(self, heads, dim):
            return nn.Linear(dim, dim)

    method = {"plan": Shortest, "plan_for": Chosen, "branch": Trained}[kind]()
    model = transformer()
    with attach(model, method):
        exact = forward(model)
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert (forward(model) - exact).abs().max() < 1e-5


def test_a_branch_says_whether_it_is_silent():
    assert is_silent(LINEAR.branch(2, 16))
    assert not is_silent(nn.Linear(2, 2))


class Knows(StepState):
    """A state that learns nothing."""

    for_less = "use less"

    def learn(self, q, k, v, dense, *, video, kernel, first):
        """Nothing."""


class Remembers(Shortest):
    def __call__(self, q, k, v, *, video, kernel, state=None):
        return kernel(q, k, v, self.plan(video, q.device))

    def step_state(self):
        return Knows()


def test_a_method_of_ones_own_may_keep_a_state():
    check_method(Remembers())
    assert Remembers().defines("step_state")
    state = Knows()
    assert (state.every, state.refuses_training) == (0, "")
    assert state.size((1, 2, 3, 4), 2) == state.host_size((1, 2, 3, 4), 2) == 0
    model = transformer()
    with torch.no_grad(), attach(model, Remembers()) as handle:
        stock = forward(model, time=900.0)
        forward(model, time=800.0)
        assert handle.summary().learned == [0]
        assert handle.summary().reused == [1]
    with torch.no_grad():
        assert torch.equal(forward(model, time=900.0), stock)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"every": "no"}, r"^every of Wrong must be of type int, such as 0, got 'no'$"),
        (
            {"learn": None},
            r"^learn of Wrong must be a method learn\(q, k, v, dense, video, ",
        ),
        ({"size": lambda self: 0}, r"^size of Wrong must take \(shape, itemsize\)"),
        ({"for_less": 3}, r"^for_less of Wrong must be of type str, such as '', got 3$"),
        ({"sizes": lambda self: 0}, r"^no part of a state .* Wrong.sizes; did you mean 'size'"),
    ],
)
def test_a_state_that_breaks_the_contract_is_refused(held, message):
    with pytest.raises(ValueError, match=message):
        type("Wrong", (StepState,), held)


def test_the_call_takes_what_the_parts_promise():
    with pytest.raises(ValueError, match=r"^__call__ of Mine must take .*state\), it takes"):
        type("Mine", (Shortest,), {"step_state": lambda self: Knows()})
    with pytest.raises(ValueError, match=r"^Mine must have one of .*, got branch and step_state$"):
        type("Mine", (Remembers,), {"branch": lambda self, heads, dim: nn.Linear(dim, dim)})
