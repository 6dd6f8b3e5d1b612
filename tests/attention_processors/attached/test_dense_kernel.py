"""Dense calls, run by a kernel instead of the model's own attention."""

import pytest
import torch
from support.methods import LINEAR, RADIAL
from support.tiny import cases_of
from support.wan import LAYERS, forward, generate, gradients, pipeline, transformer

from gen_accel import Dense, Schedule, attach, load_processors, save_processors
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.kernels import Facts, dispatch, native
from gen_accel.kernels.native import build

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch"),
]
HALF = Schedule(dense_layers=1)


def kernels_of(handle):
    """By layer and step."""
    return {
        key: None if record.choice is None else record.choice.kernel
        for key, record in handle.records.items()
    }


def assert_close(found, stock):
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["gather", "native"])
def test_dense_attention_is_the_models_own(kernel):
    model = transformer()
    stock = forward(model)
    with attach(model, Dense(), dense_kernel=kernel) as handle, torch.no_grad():
        found = forward(model)
        assert set(kernels_of(handle).values()) == {kernel}
        assert_close(found, stock)
        assert not torch.equal(found, stock)
        with handle.paused():
            assert torch.equal(forward(model), stock)
        said = f"attention ran dense throughout: method is dense, kernel {kernel}"
        assert handle.summary().verdict() == said
    assert torch.equal(forward(model), stock)


def test_layers_and_steps_that_a_schedule_keeps_dense():
    pipe = pipeline()
    schedule = Schedule(dense_layers=1, dense_steps=1)
    with attach(pipe, RADIAL, schedule=schedule, kernel="reference") as handle:
        plain = generate(pipe, 2)
        assert set(kernels_of(handle).values()) == {None, "reference"}
    options = {"schedule": schedule, "kernel": "reference", "dense_kernel": "gather"}
    with attach(pipe, RADIAL, **options) as handle:
        torch.testing.assert_close(generate(pipe, 2), plain, rtol=1e-3, atol=1e-4)
        names = [f"transformer.blocks.{i}" for i in range(LAYERS)]
        by = {(name, 0): "gather" for name in names} | {(names[0], 1): "gather"}
        assert kernels_of(handle) == by | {(name, 1): "reference" for name in names[1:]}
        assert "dense (first steps), by gather" in handle.explain(step=0)
        assert "dense (dense layer), by gather" in handle.explain(step=1, layer=names[0])
        summary = handle.summary()
        assert summary.verdict().endswith("kernel reference")
        assert summary.kernels == ["gather", "reference"]
        assert all(r.density == 1 for r in handle.records.values() if r.why_dense)


@pytest.mark.parametrize("family", ["hunyuan_video", "qwenimage", "cogvideox"])
def test_texts_and_their_masks(family):
    case = cases_of(family)[0]
    model, given = case.build(), case.inputs(*case.grids[0], lengths=case.lengths)
    with torch.no_grad():
        stock = case.call(model, given)
        with attach(model, Dense(), dense_kernel="gather") as handle:
            assert_close(case.call(model, given), stock)
            assert set(kernels_of(handle).values()) == {"gather"}


def test_it_trains():
    model = transformer()
    stock = gradients(model)
    with attach(model, Dense(), dense_kernel="gather"):
        found = gradients(model)
    assert found.keys() == stock.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, stock[name], rtol=1e-3, atol=1e-5)


def test_a_grid_that_is_not_known_stays_the_models_own():
    model = transformer()
    stock = forward(model)
    with attach(model, Dense(), dense_kernel="gather") as handle:
        hook = model.register_forward_pre_hook(
            lambda *_: setattr(handle.passing.clock, "tokens", None)
        )
        assert torch.equal(forward(model), stock)
        hook.remove()
    assert "at a grid that is not known)" in handle.explain(step=0, layer=0)


def test_techniques_for_longer_video_hold_in_it():
    """Those need blocks that no two frames share."""
    model, plans = transformer(), []

    def adjust(plan, video, step, steps):
        plans.append(plan)
        return plan

    with attach(model, RADIAL, schedule=HALF, kernel="reference", dense_kernel="gather") as handle:
        forward(model)
        handle.extensions = (AttentionExtension("none", trained=1, adjust=adjust),)
        forward(model)
        (first, *_) = kernels_of(handle).values()
    assert first == "gather"
    frame = plans[0].slots.view(-1, plans[0].block_q) // (9 * 11)
    frame = frame.masked_fill(plans[0].slots.view(frame.shape) < 0, -1)
    assert all(len(set(row.tolist()) - {-1}) == 1 for row in frame)


def test_what_calibration_observes_is_the_models_own():
    model, seen = transformer(), []
    with attach(model, LINEAR, schedule=HALF, dense_kernel="gather") as handle:
        handle.observe = lambda call: seen.append(call.layer.number)
        forward(model)
        assert set(kernels_of(handle).values()) == {None}
    assert seen == [*range(1, LAYERS)]


class TestAuto:
    @pytest.fixture
    def fastest(self, monkeypatch):
        def to_be(name):
            monkeypatch.setattr(dispatch, "faster_than_dense", lambda facts: name)

        return to_be

    @pytest.mark.parametrize("name", ["gather", None])
    def test_it_is_the_fastest_that_is_known(self, name, fastest):
        fastest(name)
        model = transformer()
        stock = forward(model)
        with attach(model, RADIAL, schedule=HALF, kernel="reference", dense_kernel="auto") as one:
            forward(model)
            assert [*kernels_of(one).values()] == [name] + ["reference"] * (LAYERS - 1)
        with attach(model, Dense(), dense_kernel="auto"):
            assert torch.equal(forward(model), stock) == (name is None)

    @pytest.mark.parametrize(
        ("machine", "dtype", "wanted"),
        [
            ({}, torch.bfloat16, "native"),
            ({}, torch.float32, "native"),
            ({}, torch.float64, None),
            ({"is_built": False}, torch.bfloat16, None),
            ({"has_tiles": True}, torch.bfloat16, None),
            ({"multiplies_bf16": False}, torch.bfloat16, None),
        ],
        ids=str,
    )
    @pytest.mark.usefixtures("native_kernel")
    def test_native_is_on_some_processors(self, machine, dtype, wanted, monkeypatch):
        has = {"is_built": True, "has_tiles": False, "multiplies_bf16": True} | machine
        monkeypatch.setattr(build, "is_built", lambda: has["is_built"])
        monkeypatch.setattr(dispatch, "has_tiles", lambda device: has["has_tiles"])
        monkeypatch.setattr(native, "multiplies_bf16", lambda: has["multiplies_bf16"])
        where = torch.device("cpu")
        assert (
            dispatch.faster_than_dense(Facts(((1, 1, 128, 64),) * 3, (dtype,) * 3, (where,) * 3))
            == wanted
        )

    def test_nothing_beats_a_gpu(self):
        where = torch.device("cuda")
        facts = Facts(((1, 1, 128, 64),) * 3, (torch.bfloat16,) * 3, (where,) * 3)
        assert dispatch.faster_than_dense(facts) is None


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "compiled"), [("auto", "blocks"), ("gather", "whole")])
def test_in_a_graph(name, compiled, monkeypatch):
    """One operator serves what is dense and what is not, at two grids."""
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "faster_than_dense", lambda facts: "gather")
    model = transformer()
    options = {"schedule": HALF, "kernel": "reference", "dense_kernel": name}
    with attach(model, RADIAL, **options) as handle, torch.no_grad():
        exact = [forward(model), forward(model, 3, 10, 14)]
        if compiled == "blocks":
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
            run = model
        else:
            run = torch.compile(model, backend="eager", fullgraph=True)
        handle.records.clear()
        for one, sizes in zip(exact, ((), (3, 10, 14)), strict=True):
            assert_close(forward(run, *sizes), one)
        if compiled == "blocks":
            assert [*kernels_of(handle).values()] == ["gather"] + ["reference"] * (LAYERS - 1)
            assert "dense (dense layer), by gather" in handle.explain(step=0, layer=0)
    torch._dynamo.reset()


class TestRefusals:
    def test_an_unknown_name(self):
        words = "dense_kernel must be 'auto' or one of .*got 'gathr'; did you mean 'gather'"
        with pytest.raises(ValueError, match=words):
            attach(transformer(), RADIAL, dense_kernel="gathr")

    def test_a_kernel_that_cannot_run_never_falls_back(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        model = transformer()
        with (
            attach(model, RADIAL, schedule=HALF, kernel="gather", dense_kernel="xformers"),
            pytest.raises(ValueError, match="\n  xformers: "),
        ):
            forward(model)


def test_it_is_saved_and_named(tmp_path):
    model = transformer()
    with attach(model, RADIAL, kernel="gather", dense_kernel="native") as handle:
        assert repr(handle).endswith("kernel 'gather', dense by 'native'>")
        save_processors(handle, tmp_path)
    with load_processors(model, tmp_path) as handle:
        assert (handle.kernel, handle.dense_kernel) == ("gather", "native")
    with load_processors(model, tmp_path, dense_kernel=None) as handle:
        assert handle.dense_kernel is None
