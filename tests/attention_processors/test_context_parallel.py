"""Two processes of diffusers' context parallelism give what one gives."""

import re

import pytest
import torch
from support import forked, hunyuan, wan
from support.checks import assert_no_worse, budget
from support.products import asked
from support.two_processes import (
    PROCESSES,
    REFUSED,
    RUNS,
    SERVED,
    TINY,
    outcome,
    process,
)

from gen_accel.attention_processors.context_parallel import context_parallel_plan

pytestmark = pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")


@pytest.fixture(scope="module")
def processes(request, tmp_path_factory):
    """Results of each process in the runs of today; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    names = [name for name in RUNS if name in asked(request)]
    torch.multiprocessing.start_processes(
        process,
        (folder, names),
        nprocs=PROCESSES,
        start_method=forked.METHOD,
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.turns(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(processes, name):
    """Each from a part of the tokens, with the work of a part if all of it is dense."""
    low, exact = (
        outcome(RUNS[name], dtype, parallel=False) for dtype in (torch.float32, torch.float64)
    )
    held = [found[name]["shape"][1] for found in processes]
    assert max(held) < low["shape"][1] <= sum(held)
    if name in (*(f"{one} Dense" for one in SERVED), "dense layers"):
        for found in processes:
            assert found[name]["flops"] == pytest.approx(low["flops"] / PROCESSES, rel=0.1)
    kinds = ("out", "gradient") if RUNS[name].gradients else ("out",)
    for kind in kinds:
        # Had rounding changed what a method picks, the budget would allow anything.
        assert budget(low[kind], exact[kind]) < 1e-4 * exact[kind].abs().max()
        for found in processes:
            assert_no_worse(found[name][kind], low[kind], exact[kind])


@pytest.mark.slow
@pytest.mark.parametrize("rule", REFUSED)
def test_what_cannot_be_split_is_refused(processes, rule):
    for found in processes:
        assert re.search(rule, found[rule]), found[rule]


@pytest.mark.slow
def test_fitting_is_refused(processes):
    for found in processes:
        assert "calibrate before enable_parallelism" in found["fitted"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "gradient"])
def test_text_before_the_video_and_a_mask_in_parts(processes, kind):
    names = ("out", "wanted") if not kind else ("gradient", "wanted gradient")
    for found in processes:
        actual, wanted = (found["joint"][name] for name in names)
        assert torch.allclose(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SERVED)
def test_plans_name_parts_of_the_model(name):
    model = TINY[name].build()
    parts = {path.split(".")[0] for path, _ in model.named_modules()}
    assert {path.split(".")[0] for path in context_parallel_plan(model)} <= parts


@pytest.mark.parametrize("name", sorted(TINY.keys() - set(SERVED)))
def test_where_there_is_no_plan_there_is_a_reason(name):
    with pytest.raises(ValueError, match=r"no plan of context parallelism for \w+: \w+"):
        context_parallel_plan(TINY[name].build())


def test_the_plan_of_diffusers_comes_first():
    model = wan.transformer()
    assert context_parallel_plan(model) == model._cp_plan


def test_a_first_frame_of_its_own_has_no_plan():
    model = hunyuan.transformer(image_condition_type="token_replace")
    with pytest.raises(ValueError, match="token_replace"):
        context_parallel_plan(model)
