"""The contract of a method: every part, its default, and what breaks it."""

from dataclasses import dataclass, field

import pytest
import torch
from support.methods import LINEAR, MIXTURE, RADIAL, WINDOW
from support.wan import forward, transformer
from torch import nn

from gen_accel import BlockMixture, Dense, Neighborhood, VideoShape, attach, attention
from gen_accel.attention_processors import METHODS
from gen_accel.attention_processors.methods.full import Full
from gen_accel.method import (
    CALLS,
    MethodParts,
    branch_of,
    check_class,
    check_method,
    density_of,
    is_silent,
    layer_method,
    layers_differ,
    memory_of,
    parts_of,
    plan_of,
    why_no_graph,
    within,
)

VIDEO = VideoShape(3, 5, 7, text=4)
ALL = [*(kind() for kind in METHODS.values()), Full(), RADIAL, WINDOW, MIXTURE, LINEAR]


class Shortest:
    """No dataclass, and no part but a plan, whose device has no default."""

    def __call__(self, q, k, v, *, video, kernel):
        return kernel(q, k, v, self.plan(video, q.device))

    def plan(self, video, device):
        return RADIAL.plan(video, device)


class Alone:
    """Computes by itself."""

    def __call__(self, q, k, v, *, video, kernel):
        return v.mean(2, keepdim=True).expand_as(v)


def made(**held):
    """An instance of a class that is `Shortest` with these attributes besides."""
    return type("Mine", (Shortest,), held)()


@pytest.mark.parametrize("method", [*ALL, Shortest(), Alone()], ids=lambda m: type(m).__name__)
def test_every_method_keeps_the_contract(method):
    check_method(method)
    assert set(parts_of(method)._fields) == set(MethodParts._field_defaults)


def test_a_part_that_is_left_out_is_its_default():
    parts = parts_of(Alone())
    assert parts == MethodParts()
    assert not parts.has_plan
    assert layer_method(Alone(), 3).__class__ is Alone
    assert branch_of(Alone(), 2, 16) is None
    assert not layers_differ(Shortest())
    method = Shortest()
    assert within(method, VIDEO, VIDEO) is method
    assert density_of(method, VIDEO) == plan_of(method, VIDEO).density == RADIAL.density(VIDEO)


def test_what_the_package_knew_by_name_is_said_by_the_methods():
    assert [n for n, kind in METHODS.items() if parts_of(kind()).is_dense] == ["dense"]
    assert parts_of(Full()).is_dense
    assert [n for n, kind in METHODS.items() if parts_of(kind()).thins_by_time] == ["radial"]
    assert [n for n, kind in METHODS.items() if layers_differ(kind())] == ["block_mixture"]
    assert not layers_differ(BlockMixture("2d"))
    window = Neighborhood((-1, 3, 4), dilation=(1, 2, 1))
    assert parts_of(window).least_grid == (1, 6, 4)
    check_plan = window.plan(VideoShape(*parts_of(window).least_grid))
    assert check_plan.density == pytest.approx(0.5)
    assert parts_of(BlockMixture(scope="head_global")).needs_all_heads == ""
    assert parts_of(BlockMixture(scope="overall")).needs_all_heads.startswith("scope='overall', ")


def test_no_plan_no_density():
    for asked in (plan_of, density_of):
        with pytest.raises(ValueError, match=r"^Alone has (no|neither) plan\(video, device\)"):
            asked(Alone(), VIDEO)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("plans", "plan"),
        ("plan_fr", "plan_for"),
        ("planfor", "plan_for"),
        ("for_layers", "for_layer"),
        ("branches", "branch"),
        ("densitys", "density"),
        ("blockmask", "block_mask"),
        ("memorys", "memory"),
    ],
)
def test_a_misspelt_part_is_named_with_the_nearest(name, near):
    wrong = type("Mine", (Alone,), {name: lambda self, *args: None})()
    with pytest.raises(ValueError, match=f"^no part of .*Mine.{name}; did you mean '{near}'"):
        check_method(wrong)


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


@pytest.mark.parametrize("part", [*CALLS, "is_dense", "thins_by_time"])
def test_a_part_of_the_wrong_type_is_named(part):
    with pytest.raises(ValueError, match=f"^{part} of Mine must be .*, got 3$"):
        check_method(made(**{part: 3}))


@pytest.mark.parametrize(
    ("held", "error"),
    [
        ({"needs_all_heads": True}, "needs_all_heads of Mine must be a str, got True"),
        ({"least_grid": (3, 3)}, r"least_grid of Mine must be three positive sizes, got \(3, 3\)"),
        ({"least_grid": (0, 3, 3)}, "least_grid of Mine must be three positive sizes"),
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
        ({"__hash__": None}, "Mine must be hashable, as an instance of a frozen dataclass is"),
    ],
)
def test_what_breaks_the_contract_is_one_line(held, error):
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        check_method(made(**held))
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be_hashed_are_refused():
    @dataclass(frozen=True)
    class Mine(Shortest):
        frames: list = field(default_factory=list)

    with pytest.raises(ValueError, match=r"Mine must be hashable.*unhashable type: 'list'"):
        check_method(Mine())


@pytest.mark.parametrize("given", [3, None, "radial", object(), [], Shortest, Dense])
def test_what_is_no_method(given):
    with pytest.raises(ValueError, match=r"method must be an instance such as Radial\(\), got"):
        check_method(given)


def test_a_module_and_other_callables_are_no_methods():
    with pytest.raises(ValueError, match=r"got Linear, a module: .* in branch\(heads, dim\)"):
        check_method(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"__call__ of \w+ must take \(q, k, v, \*, video"):
        check_method(print)
    with pytest.raises(ValueError, match=r"__call__ of <lambda> must take .*takes \(q\)"):
        check_method(lambda q: q)
    check_method(lambda q, k, v, *, video, kernel: v)


def test_what_an_instance_holds_is_checked_each_time():
    """A class that was in order does not excuse its instances."""
    check_method(Shortest())
    wrong = Shortest()
    wrong.plan = 3
    with pytest.raises(ValueError, match="plan of Shortest must be a method"):
        check_method(wrong)


def test_classes():
    check_class(Shortest, "mine")
    for kind in (3, dict, nn.Linear, lambda q: q, object):
        with pytest.raises(ValueError, match=r"method 'mine' must be a class with __call__\("):
            check_class(kind, "mine")
    vague = type("Vague", (), {"__call__": lambda self, *args, **options: None})
    with pytest.raises(ValueError, match="__call__ of Vague must name video and kernel"):
        check_class(vague, "mine")


def test_attach_and_attention_check(qkv):
    wrong = made(for_layers=lambda self, layer: self)
    with pytest.raises(ValueError, match="did you mean 'for_layer'"):
        attach(transformer(), wrong)
    with pytest.raises(ValueError, match="did you mean 'for_layer'"):
        attention(*qkv(VIDEO.tokens), video=VIDEO, method=wrong)


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
    assert [why_no_graph(method) for method in (*ALL, Shortest())] == [None] * (len(ALL) + 1)
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
    assert is_silent(branch_of(LINEAR, 2, 16))
    assert not is_silent(nn.Linear(2, 2))


class Knows:
    """A memory that learns nothing."""

    every, refuses_training, for_less = 0, "", "use less"

    def learn(self, q, k, v, dense, *, video, kernel, first):
        """Nothing."""

    def size(self, shape, itemsize):
        return 0

    host_size = size


class Remembers(Shortest):
    def __call__(self, q, k, v, *, video, kernel, memory=None):
        return kernel(q, k, v, self.plan(video, q.device))

    def memory(self):
        return Knows()


def test_a_method_of_ones_own_may_have_a_memory():
    check_method(Remembers())
    assert isinstance(memory_of(Remembers()), Knows)
    assert memory_of(Shortest()) is None
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
        ({"every": "no"}, r"^every of the memory of Mine must be of type int, got 'no'$"),
        (
            {"learn": None},
            r"^the memory of Mine must have learn\(q, k, v, dense, video, kernel, ",
        ),
        ({"size": lambda self: 0}, r"^size of the memory of Mine must take \(shape, itemsize\)"),
        ({"for_less": None}, r"^for_less of the memory of Mine must be of type str, got None$"),
    ],
)
def test_a_memory_that_breaks_the_contract_is_refused(held, message):
    memory = type("Wrong", (Knows,), held)()
    mine = type("Mine", (Remembers,), {"memory": lambda self: memory})()
    with pytest.raises(ValueError, match=message):
        check_method(mine)


def test_the_call_takes_what_the_parts_promise():
    mine = type("Mine", (Shortest,), {"memory": lambda self: Knows()})()
    with pytest.raises(ValueError, match=r"^__call__ of Mine must take .*memory\), it takes"):
        check_method(mine)
    both = type("Mine", (Remembers,), {"branch": lambda self, heads, dim: nn.Linear(dim, dim)})()
    with pytest.raises(ValueError, match=r"^Mine must have a branch or a memory, got both$"):
        check_method(both)
