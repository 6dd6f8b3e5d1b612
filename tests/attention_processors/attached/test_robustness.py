"""What a long-lived process does to a model: again and again, in threads, with failures."""

import copy
import gc
import threading
from collections import Counter

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.methods import FEW_METHODS as METHODS
from support.methods import LINEAR, RADIAL
from support.products import NIGHTLY
from support.wan import forward, generate, pipeline, processors, transformer

from gen_accel import Dense, Schedule, attach
from gen_accel.memory import PLAN_CACHE
from gen_accel.pipelines.long_video import extend

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch"),
    pytest.mark.usefixtures("one_thread"),
]


def ours():
    """Objects of the package that are alive, by class."""
    gc.collect()
    found = [type(x) for x in gc.get_objects()]
    return Counter(f"{t.__module__}.{t.__qualname__}" for t in found if _is_ours(t))


def _is_ours(kind):
    return str(getattr(kind, "__module__", "")).startswith("gen_accel")


def hooks(model):
    """Of all kinds, on all modules."""
    return sum(
        len(table)
        for module in model.modules()
        for name, table in vars(module).items()
        if "hooks" in name and isinstance(table, dict)
    )


# Again and again


def test_rounds_of_attaching_leave_nothing():
    """Many, in which the methods take turns: by night a hundred."""
    model = transformer()
    stock, original, before = forward(model), processors(model), hooks(model)

    def rounds(count):
        for method in METHODS * (count // len(METHODS)):
            handle = attach(model, method)
            forward(model, 3, 10, 14)
            attach(model, method)  # replaces
            handle.detach()
            attach(model, method).detach()

    rounds(8)  # what is kept once, such as plans, is there now
    alive, classes = ours(), _classes()
    rounds(100 if NIGHTLY else 24)
    assert not ours() - alive  # of what is kept for all, some may be dropped meanwhile
    assert _classes() == classes
    assert hooks(model) == before
    assert all(a is b for a, b in zip(processors(model), original, strict=True))
    assert torch.equal(forward(model), stock)


def _classes():
    """Processors' classes, which are made as they are needed."""
    from gen_accel.attention_processors.seam import BoundProcessor

    gc.collect()
    kinds, count = [BoundProcessor], 0
    while kinds:
        kinds = [below for kind in kinds for below in kind.__subclasses__()]
        count += len(kinds)
    return count


@pytest.mark.slow
def test_rounds_of_generation_leave_nothing():
    pipe = pipeline()
    before = hooks(pipe.transformer)

    def rounds(count):
        for _ in range(count):
            with (
                attach(pipe, RADIAL, schedule=Schedule(dense_steps=1)),
                extend(pipe, "riflex", num_frames=97),
            ):
                generate(pipe)

    rounds(1)
    alive = ours()
    rounds(5)
    assert not ours() - alive  # of what is kept for all, some may be dropped meanwhile
    assert hooks(pipe.transformer) == before


@pytest.mark.slow
def test_a_pipeline_that_is_dropped_takes_all_along():

    def dropped():
        pipe = pipeline(transformer=transformer())
        attach(pipe, LINEAR)
        generate(pipe)
        del pipe
        PLAN_CACHE.forget()  # what methods remember of grids, whoever asked
        return ours()

    alive = dropped()  # what is kept once is there now
    assert not dropped() - alive - Counter(_plans())


def _plans():
    """What methods remember of grids, whoever asked."""
    return {name: count for name, count in ours().items() if ".plan." in name}


# In threads


def test_two_pipelines_in_two_threads():
    pipes = [pipeline(transformer=transformer(seed)) for seed in (0, 1)]
    methods = [RADIAL, LINEAR]
    schedules = [Schedule(dense_steps=1), Schedule(dense_layers=1)]
    alone = []
    for pipe, method, schedule in zip(pipes, methods, schedules, strict=True):
        with attach(pipe, method, schedule=schedule):
            alone.append(generate(pipe, steps=3))
    together, failed = [[], []], []
    start = threading.Barrier(2)

    def work(number):
        try:
            torch.set_num_threads(1)
            with attach(pipes[number], methods[number], schedule=schedules[number]) as handle:
                start.wait()
                for _ in range(4):
                    together[number].append(generate(pipes[number], steps=3))
                dense = [record.why_dense for record in handle.records.values()]
                assert 0 < sum(why is not None for why in dense) < len(dense)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for results, expected in zip(together, alone, strict=True):
        assert len(results) == 4
        assert all(torch.equal(result, expected) for result in results)


# With failures


class Broken(Exception):
    pass


@pytest.mark.turns(5)
@every_method
@pytest.mark.parametrize("inside", ["a step", "a block"])
def test_an_exception_leaves_the_model_detachable(method, inside):
    pipe = pipeline(transformer=transformer())
    original, stock = processors(pipe), generate(pipe, steps=3)
    handle = attach(pipe, method)
    expected = generate(pipe, steps=3)

    def fail(*args, **kwargs):
        raise Broken

    if inside == "a block":
        hook = pipe.transformer.blocks[1].attn1.to_out[0].register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            generate(pipe, steps=3)
        hook.remove()
    else:
        with pytest.raises(Broken):
            generate(pipe, steps=3, callback_on_step_end=fail)
    assert torch.equal(generate(pipe, steps=3), expected)  # as if nothing had been
    handle.detach()
    assert all(a is b for a, b in zip(processors(pipe), original, strict=True))
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(generate(pipe, steps=3), stock)


# Copies and files


@pytest.mark.turns(3)
@every_method
def test_a_copy_of_a_pipeline_has_an_attachment_of_its_own(method):
    pipe = pipeline(transformer=transformer())
    stock = generate(pipe)
    handle = attach(pipe, method)
    expected = generate(pipe)
    twin = copy.deepcopy(pipe)
    handle.detach()
    assert torch.equal(generate(pipe), stock)
    assert torch.equal(generate(twin), expected)
    attach(twin, Dense()).detach()
    assert torch.equal(generate(twin), stock)


@every_method
def test_a_saved_model_loads_as_the_stock_model(method, tmp_path):
    """Parameters of a method are in the file as in the state dict, and named by diffusers when it
    leaves them out; `save_processors` keeps them for another day."""
    model = transformer()
    stock, names = forward(model), set(model.state_dict())
    with attach(model, method):
        model.save_pretrained(tmp_path)
    loaded, report = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loaded.state_dict()) == names
    assert not report["missing_keys"]
    left_out = report["unexpected_keys"]
    assert bool(left_out) == method.has_parameters
    assert all(".processor.branch." in name for name in left_out)
    assert torch.equal(forward(loaded.eval()), stock)
