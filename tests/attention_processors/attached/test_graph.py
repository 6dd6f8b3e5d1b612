"""Graphs of torch.compile: one serves every size and every length of text."""

import copy
import itertools
from typing import Any

import pytest
import torch
from support import wan
from support.methods import LINEAR, MIXTURE, RADIAL, WINDOW
from support.products import NIGHTLY
from support.tiny import Case, cases, cases_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gen_accel import Dense, Schedule, attach, kernels
from gen_accel.attention_processors.families import FAMILIES, family_of
from gen_accel.method import Method

MANY = 40 if NIGHTLY else 8
MANY_TEXTS = MANY if NIGHTLY else 4

# The others' turn comes by night.
GRIDS = ("wan",)
TEXTS = ("hunyuan_video",)
TRAINING = ("wan",)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread", "dynamo"),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch"),
    pytest.mark.filterwarnings("ignore::gen_accel.pipelines.NothingSaved"),
]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def repeated(often: tuple[str, ...], names: tuple[str, ...] = FAMILIES) -> list[Any]:
    """The first case of each family; all but those of `often` by night."""
    found = []
    for family in names:
        marks = () if family in often else pytest.mark.nightly
        found += [pytest.param(case, id=case.name, marks=marks) for case in cases_of(family)[:1]]
    return found


def built(case: Case) -> nn.Module:
    model = case.build()
    if not getattr(model, "_repeated_blocks", None):
        pytest.skip(f"diffusers compiles no blocks of {type(model).__name__}")
    return model


def sizes(case: Case) -> list[tuple[int, int, int]]:
    """`MANY` grids that differ, no side a multiple of a tile's."""
    still = all(frames == 1 for frames, _, _ in case.grids)
    frames = (1,) if still else (3, 5, 7)
    sides = itertools.product(frames, range(5, 18), range(5, 18))
    return [*itertools.islice(sides, 0, None, 3)][:MANY]


def run(model: nn.Module, case: Case, given: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [case.call(model, one) for one in given]


def graphs(model: nn.Module, case: Case, given: list[dict[str, Any]], exact: list[Tensor]) -> int:
    """How many it takes to run all of `given`, each of which has to be `exact`."""
    counter = CompileCounter()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    for one, expected in zip(given, exact, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(case.call(model, one), expected, rtol=1e-5, atol=1e-5)
    return counter.frame_count


def check_as_few_as_stock(case: Case, given: list[dict[str, Any]], method: Any) -> None:
    """After a stock model of the class was compiled in this process too."""
    stock, model = built(case), built(case)
    plain = run(stock, case, given)
    needed = graphs(stock, case, given, plain)
    torch._dynamo.reset()
    graphs(built(case), case, given[:1], plain[:1])
    with attach(model, method):
        exact = run(model, case, given)
        assert not all(map(torch.equal, exact, plain))
        assert graphs(model, case, given, exact) <= needed


@pytest.mark.parametrize("case", repeated(GRIDS))
def test_one_graph_for_every_grid(case):
    check_as_few_as_stock(case, [case.inputs(*size) for size in sizes(case)], WINDOW)


@pytest.mark.parametrize("method", [RADIAL, MIXTURE, LINEAR] if NIGHTLY else [LINEAR], ids=str)
def test_one_graph_with_every_method(method):
    case = next(case for case in cases() if case.name == "wan")
    check_as_few_as_stock(case, [case.inputs(*size) for size in sizes(case)[:12]], method)


def shortened(given: dict[str, Any], tokens: int) -> dict[str, Any]:
    """With fewer tokens of text."""
    texts = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask")
    found = {
        name: value[:, :tokens] if name in texts and value is not None else value
        for name, value in given.items()
    }
    if "txt_ids" in found:
        found["txt_ids"] = found["txt_ids"][:tokens]
    if "cap_feats" in found:
        found["cap_feats"] = [text[:tokens] for text in found["cap_feats"]]
    return found


def texts_of(case: Case) -> list[dict[str, Any]]:
    """`MANY_TEXTS` calls of one grid, each with a text of another length or padding."""
    grid = case.grids[0]
    if case.lengths is None:
        given = case.inputs(*grid)
        longest = text_tokens(given)
        return [shortened(given, n) for n in range(longest, 0, -1)][:MANY_TEXTS]
    longest = max(case.lengths)
    pairs = itertools.product(range(1, longest + 1), repeat=2)
    return [
        shortened(case.inputs(*grid, lengths=pair), max(pair) + extra)
        for extra in range(3)
        for pair in pairs
    ][:MANY_TEXTS]


def text_tokens(given: dict[str, Any]) -> int:
    if "cap_feats" in given:
        return min(len(text) for text in given["cap_feats"])
    return given["encoder_hidden_states"].shape[1]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "case", repeated(TEXTS, ("hunyuan_video", "z_image", "flux", "qwenimage"))
)
def test_one_graph_for_every_length_of_text(case):
    check_as_few_as_stock(case, texts_of(case), WINDOW)


@pytest.mark.parametrize("case", repeated(TRAINING))
def test_a_training_step_in_a_graph(case):
    """At two grids, the second of which has no graph of its own."""
    model = built(case)
    model.requires_grad_(False)
    sites = family_of(model).self_attentions(model)
    trained = [
        parameter
        for site in sites
        for name, parameter in site.module.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2
    ]
    for parameter in trained:
        parameter.requires_grad_()

    def gradients(size: tuple[int, int, int]) -> list[Tensor]:
        out = case.call(model, case.inputs(*size))
        found = torch.autograd.grad(out.square().mean(), trained, allow_unused=True)
        return [grad for grad in found if grad is not None]

    with attach(model, LINEAR):
        exact = [gradients(size) for size in sizes(case)[:3]]
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        for size, expected in zip(sizes(case)[:3], exact, strict=True):
            found = gradients(size)
            assert len(found) == len(expected) > 0
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("case", repeated(()))
def test_by_inductor(case):
    """At three grids it errs as much as the stock model does, at most twice."""
    stock, model = built(case), built(case)
    given = [case.inputs(*size) for size in sizes(case)[:3]]

    def errors(one: nn.Module) -> list[float]:
        exact = run(one, case, given)
        one.compile_repeated_blocks(fullgraph=True)
        found = run(one, case, given)
        return [(a - b).abs().max().item() for a, b in zip(found, exact, strict=True)]

    allowed = 2 * max(errors(stock)) + 1e-4
    with attach(model, WINDOW):
        assert max(errors(model)) <= allowed


def test_parameters_of_the_method_get_gradients():
    """Of layers that share a graph, each its own."""
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with attach(model, LINEAR) as handle:
        for number, branch in enumerate(handle.branches.values()):
            for parameter in branch.parameters():
                torch.nn.init.constant_(parameter, 0.1 * (number + 1))
        trained = [p for branch in handle.branches.values() for p in branch.parameters()]

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(case.call(model, given).square().mean(), trained)

        exact = gradients()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        found = gradients()
    assert all(grad.abs().max() > 0 for grad in exact)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.turns(3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_goes_into_the_graph(backend):
    """Where norms give fp32 beside bf16, and the method has parameters in fp32."""
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    for block in model.blocks:
        block.attn1.norm_q.forward = lambda x: torch.nn.functional.rms_norm(
            x.float(), x.shape[-1:]
        )
    with attach(model, LINEAR) as handle:
        for branch in handle.branches.values():
            for parameter in branch.parameters():
                torch.nn.init.constant_(parameter, 0.1)
        trained = [p for branch in handle.branches.values() for p in branch.parameters()]

        def step() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                out = case.call(model, given)
            return [out.detach(), *torch.autograd.grad(out.float().square().mean(), trained)]

        exact = step()
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        for one, other in zip(step(), exact, strict=True):
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


def test_what_ran_in_graphs_is_recorded():
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with attach(model, RADIAL, schedule=Schedule(dense_layers=1)) as handle, torch.no_grad():
        case.call(model, given)
        density = handle.summary().density
        handle.records.clear()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        case.call(model, given)
        assert handle.summary().density == density < 1
        assert "dense layer" in handle.explain(step=0, layer=0)
        assert "in a graph of torch.compile" in handle.explain(step=0, layer=0)
        assert "sparse, density" in handle.explain(step=0, layer=1)


def test_dense_layers_and_steps_of_graphs_count_as_dense():
    """The verdict of compiled blocks is that of plain ones."""
    pipe = wan.pipeline()
    schedule = Schedule(dense_start=0.5, dense_layers=1)
    with attach(pipe, MIXTURE, schedule=schedule, kernel="gather") as handle:
        wan.generate(pipe, 4)
        plain = handle.summary()
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        wan.generate(pipe, 4)
        compiled = handle.summary()
    assert compiled.verdict() == plain.verdict()
    assert compiled.flops_share == pytest.approx(plain.flops_share)


def test_detached_processors_that_are_put_back_run_the_models_own():
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with torch.no_grad():
        stock = case.call(model, given)
        handle = attach(model, WINDOW)
        ours = [block.attn1.processor for block in model.blocks]
        case.call(model, given)
        handle.detach()
        for block, processor in zip(model.blocks, ours, strict=True):
            block.attn1.set_processor(processor)
        assert torch.equal(case.call(model, given), stock)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(case.call(model, given), stock)


def test_a_default_device_does_not_move_what_finds_a_layer():
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with torch.device("meta"):
        attach(model, WINDOW)
    with torch.no_grad():
        sparse = case.call(model, given)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(case.call(model, given), sparse)


class Values(Method):
    """A method whose plan keeps all, and that gives the values themselves."""

    def __call__(self, q, k, v, *, video, kernel):
        return v

    def plan(self, video, device):
        return Dense().plan(video, device)


def test_an_output_that_is_an_input():
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with attach(model, Values()), torch.no_grad():
        plain = case.call(model, given)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(case.call(model, given), plain)


def test_a_graph_that_trains_asks_for_a_kernel_with_a_gradient(monkeypatch):
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    asked = []
    unsupported = kernels.unsupported

    def spy(name: str, facts: Any) -> list[str]:
        asked.append(facts.grad)
        return unsupported(name, facts)

    monkeypatch.setattr(kernels, "unsupported", spy)
    with attach(model, WINDOW, kernel="gather"):
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        case.call(model, given).square().mean().backward()
    assert asked
    assert all(asked)


class ByItself(Method):
    """A method that computes without a kernel."""

    def __call__(self, q, k, v, *, video, kernel):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 2


@pytest.mark.turns(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ByItself()}, "ByItself has no plan"),
        ({"method": RADIAL, "kernel": "xformers"}, "xformers: "),
    ],
    ids=["no plan", "kernel"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_refusals_keep_their_words(options, message, whole):
    """What a graph cannot run, or no one here, says so as without a graph."""
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    if "kernel" in options and torch.cuda.is_available():
        pytest.skip("that kernel may run here")
    with attach(model, **options), torch.no_grad():
        if "kernel" in options:
            with pytest.raises(ValueError, match=message) as eager:
                case.call(model, given)
        if whole:
            model.compile(backend="eager", fullgraph=True)
        else:
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
        with pytest.raises(ValueError, match=message) as compiled:
            case.call(model, given)
    if "kernel" in options:
        assert str(compiled.value) == str(eager.value)


def test_a_copy_has_its_own_place():
    case = next(case for case in cases() if case.name == "wan")
    model, given = built(case), case.inputs(*case.grids[0])
    with torch.no_grad():
        stock = case.call(model, given)
        attach(model, WINDOW)
        sparse = case.call(model, given)
        twin = copy.deepcopy(model)
        places = [
            int(site.module.processor.place)
            for one in (model, twin)
            for site in family_of(one).self_attentions(one)
        ]
        assert len(set(places)) == len(places)
        twin.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(case.call(twin, given), sparse)
        model.blocks[0].attn1.processor.owner.detach()
        assert torch.equal(case.call(model, given), stock)
        assert torch.equal(case.call(twin, given), sparse)
