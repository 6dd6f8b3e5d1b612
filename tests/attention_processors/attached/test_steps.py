"""Methods that are told how far a run is: their part `at`."""

from dataclasses import dataclass, replace

import pytest
import torch
from support.methods import RADIAL
from support.wan import GRID, LAYERS, forward, generate, pipeline, transformer

from gen_accel import Neighborhood, Schedule, VideoShape, attach
from gen_accel.method import Method, Step

pytestmark = [pytest.mark.usefixtures("one_thread")]
asked = []


@dataclass(frozen=True)
class Narrowing(Method):
    """Windows that lose two rows and columns over a run."""

    window: int = 5

    def plan(self, video, device):
        return Neighborhood((-1, self.window, self.window)).plan(video, device)

    def at(self, step):
        asked.append(step.progress)
        return replace(self, window=self.window - round(2 * step.progress))


@pytest.fixture(autouse=True)
def fresh():
    asked.clear()


def densities(handle):
    """By step; all layers of a step have the same."""
    found = {}
    for (_, step), record in handle.records.items():
        if record.why_dense is None:
            found.setdefault(step, set()).add(round(record.density, 6))
    assert all(len(some) == 1 for some in found.values())
    return {step: some.pop() for step, some in sorted(found.items())}


def expected(*windows):
    return [round(Narrowing(window).density(VideoShape(*GRID)), 6) for window in windows]


def test_progress_runs_over_the_sparse_steps():
    assert [Schedule().progress(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    some = Schedule(dense_start=0.2, dense_end=0.2, dense_steps=2)
    assert [some.progress(i, 5) for i in range(5)] == [0, 0, 0, 1, 1]
    assert Schedule(dense_layers=3).progress(1, 3) == 0.5
    assert [Schedule().progress(i, None) for i in range(3)] == [0, 0, 0]
    assert Schedule().progress(0, 1) == Schedule(dense_steps=4).progress(3, 4) == 0


def test_each_step_runs_its_own():
    """Guidance makes two calls of a step, and each layer one: they ask once."""
    pipe = pipeline()
    with attach(pipe, Narrowing(), schedule=Schedule(dense_steps=1), kernel="gather") as handle:
        generate(pipe, 4)
        assert [*densities(handle).values()] == expected(5, 4, 3)
        assert [*dict.fromkeys(asked)] == [0.0, 0.5, 1.0]
        assert handle.summary().method == Narrowing()
        generate(pipe, 3)
        assert [*densities(handle).values()] == expected(5, 3)
    assert {*asked} == {0.0, 0.5, 1.0}


def test_an_answer_is_that_of_the_method_of_the_step():
    model = transformer()
    with attach(model, Narrowing(4), kernel="gather"):
        wanted = forward(model)
    with attach(model, Narrowing(5), kernel="gather") as handle:
        first = forward(model)
        handle.passing.progress = 0.5
        assert torch.equal(forward(model), wanted)
    assert not torch.equal(first, wanted)


def test_without_a_pipeline_nobody_knows_how_many_steps_there_are():
    model = transformer()
    with attach(model, Narrowing(), kernel="gather") as handle, torch.no_grad():
        for time in (900.0, 500.0, 100.0):
            forward(model, time=time)
        assert len({*densities(handle).values()}) == 1
    assert {*asked} == {0.0}


def test_gradient_checkpointing_comes_back_to_the_step():
    model = transformer()
    with attach(model, Narrowing(), kernel="gather") as handle:
        out = forward(model)
        handle.passing.progress = 1.0
        out.sum().backward()
        assert handle.passing.progress == 0.0


@pytest.mark.slow
def test_graphs_see_it_when_they_run():
    """No step has a graph of its own."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    pipe, counter = pipeline(), CompileCounter()
    with attach(pipe, Narrowing(), kernel="gather") as handle:
        exact = generate(pipe, 3)
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        torch.testing.assert_close(generate(pipe, 3), exact, rtol=1e-3, atol=1e-4)
        assert [*densities(handle).values()] == expected(5, 4, 3)
    assert counter.frame_count <= LAYERS
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_model_that_is_one_graph_says_that_steps_cannot_be_told():
    torch._dynamo.reset()
    pipe = pipeline()
    with attach(pipe, Narrowing(), kernel="gather"):
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        words = "a method that follows them, needs fullgraph=False"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
            generate(pipe, 2)
    torch._dynamo.reset()


def test_a_method_without_it_is_itself():
    assert RADIAL.at(Step(progress=0.5)) is RADIAL
    assert Narrowing().at(Step(progress=1.0)) == Narrowing(3)


def test_what_it_returns_must_be_a_method():
    @dataclass(frozen=True)
    class Wrong(Narrowing):
        def at(self, step):
            return step.progress

    pipe = pipeline()
    with (
        attach(pipe, Wrong(), kernel="gather"),
        pytest.raises(ValueError, match=r"method must be an instance such as Radial\(\), got 0.0"),
    ):
        generate(pipe, 2)


def test_dense_steps_are_named_by_their_numbers():
    schedule = Schedule(dense=(1, 2, -2))
    assert schedule.needs_total
    assert schedule.sparse_steps(6) == (0, 3, 5)
    assert not Schedule(dense=(1, 2)).needs_total
    assert Schedule(dense=(1, 2)).why_step(2, None) == "named step"
    assert [schedule.progress(i, 6) for i in (0, 3, 5)] == [0, 0.5, 1]


def test_steps_that_pass_through_a_range_of_noise_are_dense():
    schedule = Schedule(dense_noise=(0.95, 0.8))
    levels = (1.0, 0.97, 0.9, 0.8, 0.5, 0.0)
    assert schedule.sparse_steps(5, levels) == (0, 3, 4)
    # The one step of a short run that spans the range.
    assert schedule.sparse_steps(3, (1.0, 0.75, 0.4, 0.0)) == (1, 2)
    assert schedule.sparse_steps(10) == (2, 3, 4, 5, 6, 7, 8, 9)


def test_the_noise_is_the_schedulers_own():
    pipe = pipeline()
    with attach(
        pipe, RADIAL, schedule=Schedule(dense_noise=(0.99, 0.8)), kernel="gather"
    ) as handle:
        generate(pipe, 6)
        levels = handle.clock.levels()
        assert levels is not None
        assert len(levels) == 7
        assert levels[0] > 0.99
        assert levels[-1] == 0
        dense = {step for step, why in handle.passing.steps.items() if why}
        assert dense == {i for i in range(6) if levels[i + 1] < 0.99 and levels[i] > 0.8}
        assert 0 < len(dense) < 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dense_noise": (0.5, 0.9)}, "dense_noise must be"),
        ({"dense_noise": (1.5, 0.5)}, "dense_noise must be"),
        ({"dense": (0.5,)}, "dense"),
        ({"dense_noise": (0.9,)}, "dense_noise"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**options)


def test_noise_needs_a_pipeline():
    with pytest.raises(ValueError, match="which only a pipeline knows"):
        attach(transformer(), RADIAL, schedule=Schedule(dense_noise=(0.9, 0.8)))
