"""The contract of a kernel, and the one source of what each refuses."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import wan
from support.problems import random_plan

from gen_accel import BlockMixture, Dense, Radial, VideoShape, attach, kernels, registry
from gen_accel.functional import attention
from gen_accel.kernels import KERNELS, Facts, facts_of, flex, kernel_of, reference, refusals
from gen_accel.kernels.base import PATTERNS, Kernel
from gen_accel.kernels.native import build
from gen_accel.plan import Plan, Rest

CPU = torch.device("cpu")
CLASS = """\
from gen_accel.kernels import reference
from gen_accel.kernels.base import AutoPlace, Kernel

class Mine(Kernel):
    def forward(self, q, k, v, plan, *, scale):
        return reference.kernel.forward(q, k, v, plan, scale=scale)
"""
LSE = """
    def forward_lse(self, q, k, v, plan, *, scale, wide=False):
        assert plan.rest is None
        return reference.kernel.forward_lse(q, k, v, plan, scale=scale, wide=wide)
"""
PLACE = """
    def place(self, facts):
        return AutoPlace(1)
"""
MADE = "\nkernel = Mine()\n"


@pytest.fixture
def plan():
    return Plan(torch.arange(64), torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)


@pytest.fixture
def added(monkeypatch, tmp_path):
    """Adds a kernel as its author does: one file, and one name in `KERNELS`."""

    def add(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
        for module in (kernels, registry):
            monkeypatch.setattr(module, "KERNELS", (*KERNELS, name))

    yield add
    for name in [name for name in sys.modules if name.startswith("gen_accel.kernels.mine")]:
        del sys.modules[name]
    kernel_of.cache_clear()


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_keeps_the_contract(name):
    assert kernel_of(name) is kernel_of(name)


def forward(self, q, k, v, plan, *, scale):
    return q


def allowance(self, q, k, v, weights, *, plan, scale):
    return 0.1


BROKEN = {
    "a part misspelt": (
        {"forward": forward, "unsuported": lambda self, facts: []},
        r"no part of a kernel is called 'unsuported', .*; did you mean 'unsupported'\?",
    ),
    "an attribute misspelt": (
        {"forward": forward, "takes_rests": True},
        r"called 'takes_rests', .*; did you mean 'takes_rest'\?",
    ),
    "a log-sum-exp misspelt": (
        {"forward": forward, "forward_lce": forward},
        r"called 'forward_lce', got Mine.forward_lce; did you mean 'forward_lse'\?",
    ),
    "other arguments": (
        {"forward": lambda self, q, k, v, plan: q},
        r"forward of Mine must take \(q, k, v, plan, \*, scale\), it takes \(q, k, v, plan\)",
    ),
    "another type": (
        {"forward": forward, "takes_rest": "yes"},
        r"takes_rest of Mine must be of type bool, such as False, got 'yes'",
    ),
    "a log-sum-exp that cannot be wide": (
        {"forward_lse": forward},
        r"forward_lse of Mine must take \(q, k, v, plan, \*, scale, wide\), it takes ",
    ),
    "no function": (
        {"forward": forward, "place": 3},
        r"place of Mine must be a method place\(facts\), got 3",
    ),
    "nothing that computes": ({}, r"Mine has no forward\(q, k, v, plan, \*, scale\)"),
    "an allowance and a place": (
        {"forward": forward, "allowance": allowance, "place": lambda self, facts: None},
        r"Mine has an allowance and a place: .* runs by its name alone",
    ),
}


@pytest.mark.parametrize(("parts", "words"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_contract_is_named(parts, words):
    with pytest.raises(ValueError, match=words):
        type("Mine", (Kernel,), parts)


def test_names_of_another_purpose_are_free():
    made = type("Mine", (Kernel,), {"forward": forward, "backward_pass": 3, "_plase": 4})
    assert made().unsupported(None) == []


def test_a_module_without_a_kernel_is_named(added):
    added("mine_empty", "")
    with pytest.raises(ValueError, match="mine_empty has no `kernel`"):
        kernel_of("mine_empty")


def test_a_new_kernel_is_one_file_and_one_line(added, plan, qkv):
    added("mine", CLASS + MADE)
    told = []
    inputs = qkv(64)
    out = kernels.run(*inputs, plan, scale=0.3, kernel="mine", report=told.append)
    assert torch.equal(out, reference.kernel.forward(*inputs, plan, scale=0.3))
    assert told[0].kernel == "mine"
    assert "mine" not in kernels.preference(facts_of(*inputs, plan))  # it has no place
    case = {"video": VideoShape(1, 8, 8), "method": Dense()}
    assert torch.equal(attention(*inputs, kernel="mine", scale=0.3, **case), out)
    kernels.check_name("mine")


def test_a_new_kernel_says_its_place_itself(added, plan, qkv):
    added("mine_first", CLASS + PLACE + MADE)
    told = []
    kernels.run(*qkv(64), plan, scale=0.3, report=told.append)
    assert told[0].kernel == "mine_first"
    assert next(iter(told[0].behind)) == "gather"


def test_a_new_kernel_with_a_log_sum_exp_adds_the_rest(added, plan, qkv):
    added("mine_lse", CLASS + LSE + MADE)
    inputs, asked = qkv(64), replace(plan, keep=plan.keep.tril(), rest=Rest())
    run = partial(kernels.run_lse, *inputs, scale=0.3)
    found, wanted = (run(asked, kernel=name) for name in ("mine_lse", "reference"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    kept, wanted = (run(asked.kept, kernel=name) for name in ("mine_lse", "reference"))
    assert all(map(torch.equal, kept, wanted))


def test_a_new_kernel_that_takes_rests_is_given_them(added, plan, qkv):
    takes = "\n    takes_rest = True\n"
    added("mine_rests", CLASS + LSE.replace("plan.rest is None", "plan.rest") + takes + MADE)
    inputs, asked = qkv(64), replace(plan, keep=plan.keep.tril(), rest=Rest())
    out = kernels.run(*inputs, asked, scale=0.3, kernel="mine_rests")
    assert torch.equal(out, reference.kernel.forward(*inputs, asked, scale=0.3))


@pytest.mark.parametrize(
    ("rest", "words"), [(None, "it gives no log-sum-exp"), (Rest(), "it adds no rest")], ids=str
)
def test_a_new_kernel_without_a_log_sum_exp_is_passed_over(rest, words, added, plan, qkv):
    added("mine_plain", CLASS + PLACE + MADE)
    told, asked = [], replace(plan, keep=plan.keep.tril(), rest=rest)
    run = partial(kernels.run_lse, *qkv(64), asked, scale=0.3)
    with pytest.raises(ValueError, match=f"mine_plain: {words}"):
        run(kernel="mine_plain")
    run(report=told.append)
    assert told[0].kernel == "gather"
    assert told[0].refused == {"mine_plain": [words]}


def test_a_misspelt_new_kernel_is_refused_at_its_first_use(added, plan, qkv):
    added("mine_misspelt", CLASS + LSE.replace("forward_lse", "forward_lce", 1) + MADE)
    with pytest.raises(ValueError, match=r"'forward_lce', got Mine\.forward_lce"):
        kernels.run(*qkv(64), plan, scale=0.3, kernel="mine_misspelt")


def test_the_orders_of_auto(monkeypatch):
    def order(device, pattern="blocks"):
        where = torch.device(device)
        facts = Facts(((1, 2, 64, 16),) * 3, (torch.float32,) * 3, (where,) * 3, pattern)
        return [*kernels.preference(facts)]

    rest = ["flex", "triton", "fa4", "xformers", "natten"]
    assert order("cpu") == ["gather", "routed", *rest, "native", "reference"]
    assert order("cpu", "route") == ["routed", "gather", *rest, "native", "reference"]
    assert order("cuda") == ["triton", "flex", "xformers", "fa4", "natten", "gather", "reference"]
    monkeypatch.setattr(build, "is_built", lambda: True)
    assert order("cpu") == ["native", "gather", "routed", *rest, "reference"]
    assert order("cuda") == ["triton", "flex", "xformers", "fa4", "natten", "gather", "reference"]


@pytest.mark.parametrize("which", range(3), ids="qkv".__getitem__)
@pytest.mark.parametrize("name", KERNELS)
def test_inputs_of_several_dtypes_are_refused_by_every_kernel(name, which, plan, qkv):
    inputs = qkv(64)
    inputs[which] = inputs[which].bfloat16()
    words = "q, k and v must be alike, got .*torch.bfloat16"
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        kernels.run(*inputs, plan, scale=0.3, kernel=name)
    (reason,) = kernels.unsupported(name, facts_of(*inputs, plan))
    assert reason.startswith("q, k and v must be alike")


def test_auto_lists_what_each_that_it_tries_says_of_them(plan, qkv):
    q, k, v = qkv(64)
    with pytest.raises(ValueError, match="must be alike") as error:
        kernels.run(q, k.double(), v, plan, scale=0.3)
    tried = kernels.preference(facts_of(q, k, v, plan))
    assert str(error.value).count("must be alike") == len(tried)


def test_under_autocast_they_become_its_dtype(plan, qkv):
    """As they do for torch's own attention: layers that norm q and k give fp32 there."""
    q, k, v = qkv(64)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.run(q, k, v.bfloat16(), plan, scale=0.3)
        alike = kernels.run(q, k, v, plan, scale=0.3)
        exact = kernels.run(*(x.double() for x in (q, k, v)), plan, scale=0.3)
        stock = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    low = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, kernels.run(*low, plan, scale=0.3))
    assert torch.equal(alike, out)
    assert (out.dtype, exact.dtype) == (stock.dtype, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["generating", "training"])
@pytest.mark.parametrize("name", KERNELS)
def test_one_source_says_what_is_refused(name, grad, dtype, monkeypatch, qkv):
    """`run`, `check_kernel` and `gen-accel list` give the same reasons for the same facts."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(flex, "cpp_compiler", lambda: None)
    said = refusals(name, CPU, dtype, grad=grad)
    if not said:
        return
    route = {"route": True} if name == "routed" else {}
    plan = random_plan(CPU, **route)
    inputs = qkv(plan.tokens, dtype, dim=64, grad=grad)
    with pytest.raises(ValueError, match="no kernel for") as error:
        kernels.run(*(x.to(CPU) for x in inputs), plan, scale=0.3, kernel=name)
    for reason in said:
        assert reason in str(error.value)
    if dtype == torch.float32 and not grad:
        with pytest.raises(ValueError, match=f"kernel '{name}' cannot run on cpu: ") as error:
            kernels.check_kernel(name, CPU)
        assert str(error.value).endswith("; ".join(said))


def test_a_kernel_for_one_kind_of_plan_runs_somewhere():
    """`routed` takes routes alone; a question about any plan does not refuse it for that."""
    facts = Facts(((1, 2, 64, 16),) * 3, (torch.float32,) * 3, (CPU,) * 3)
    assert kernels.unsupported("routed", facts) != []
    assert refusals("routed", CPU, torch.float32) == []
    assert "for the CPU" in refusals("routed", torch.device("meta"), torch.float32)[0]


def test_flex_says_that_it_needs_a_compiler_before_it_tries(plan, monkeypatch, qkv):
    monkeypatch.setattr(flex, "cpp_compiler", lambda: None)
    with pytest.raises(ValueError, match="flex: no C\\+\\+ compiler; see gen-accel doctor"):
        kernels.run(*(x.cpu() for x in qkv(64)), plan, scale=0.3, kernel="flex")


def test_facts_are_those_of_the_call(qkv):
    plan = random_plan(CPU, windows=True)
    q, k, v = (x.cpu() for x in qkv(plan.tokens))
    facts = facts_of(q, k.requires_grad_(), v, plan)
    assert (facts.pattern, facts.dim, facts.grad) == ("windows", 16, True)
    assert (facts.gain, facts.dynamic, facts.forward_mode) == (False, False, False)
    with torch.no_grad():
        assert not facts_of(q, k, v, plan).grad
    assert facts_of(q, k, v, plan, lse=True).lse
    assert not facts_of(q, k, v, plan).lse
    assert not facts.rest
    assert facts_of(q, k, v, random_plan(CPU, rest=Rest())).rest
    damped = plan.changed(gain=torch.full(plan.keep.shape, 0.5))
    assert facts_of(q, k, v, damped).gain
    route = random_plan(CPU, route=True)
    assert facts_of(q, k, v, route).pattern == "route"
    assert set(PATTERNS) == {"blocks", "windows", "route"}
    with torch.autograd.forward_ad.dual_level():
        assert facts_of(q, k, v, plan).forward_mode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "xformers", "gater"])
def test_the_sentence_is_the_same_in_a_graph(name, monkeypatch, qkv):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [x.cpu() for x in qkv(64)]

    def call(*inputs):
        return attention(*inputs, video=VideoShape(1, 8, 8), method=Dense(), kernel=name)

    with pytest.raises(ValueError, match="kernel") as eager:
        call(*inputs)
    with pytest.raises(Exception, match="kernel") as compiled:
        torch.compile(call, backend="eager")(*inputs)
    assert str(eager.value) in str(compiled.value)


def test_a_graph_that_must_not_break_says_what_to_do(plan, qkv):
    def call(*inputs):
        return kernels.run(*inputs, plan, scale=0.3)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"):
        compiled(*qkv(64))


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["triton", "xformers"])
@pytest.mark.parametrize(
    "method", [Radial(block=16), BlockMixture(chunks=(2, 4, 8))], ids=["radial", "mixture"]
)
def test_a_compiled_model_says_what_a_model_says(method, kernel, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = wan.transformer().cpu()
    with attach(model, method, kernel=kernel), torch.no_grad():
        with pytest.raises(ValueError, match=f"no kernel for q .*\n  {kernel}: ") as eager:
            wan.forward(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(ValueError, match=f"no kernel for q .*\n  {kernel}: ") as in_a_graph:
            wan.forward(compiled)
    assert str(in_a_graph.value) == str(eager.value)


@pytest.mark.slow
def test_a_compiled_model_runs_by_a_kernel_that_no_graph_can_hold():
    """The kernel runs as it does outside: `reference` too."""
    model = wan.transformer().cpu()
    with attach(model, Radial(block=16), kernel="reference") as handle, torch.no_grad():
        plain = wan.forward(model)
        found = wan.forward(torch.compile(model, fullgraph=True, backend="eager"))
        assert {record.choice.kernel for record in handle.records.values()} == {"reference"}
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


@pytest.fixture
def norms_of_cuda(monkeypatch):
    """RMSNorm gives float32 under autocast, as on CUDA, where it stands in autocast's list."""
    own = torch.nn.RMSNorm.forward

    def forward(self, x):
        if not torch.is_autocast_enabled(x.device.type):
            return own(self, x)
        with torch.autocast(x.device.type, enabled=False):
            return own(self, x.float())

    monkeypatch.setattr(torch.nn.RMSNorm, "forward", forward)


SEEN_BY = {name: Radial(block=16) for name in ("reference", "gather", "native", "triton")}
SEEN_BY["routed"] = BlockMixture(chunks=(2, 4, 8), block=8)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("kernel", SEEN_BY)
def test_a_model_whose_norms_give_fp32_trains_under_autocast(kernel, norms_of_cuda, monkeypatch):
    """Queries and keys come in fp32, values in bf16: what comes out is of bf16, near to fp32's."""
    model, seen = wan.transformer(), []

    def step():
        out = wan.forward(model, 3, 6, 8, batch=1)
        loss = out.float().square().mean()
        return [out.detach().float(), *torch.autograd.grad(loss, trained)]

    trained = [p for n, p in model.named_parameters() if "attn1.to_" in n and p.ndim == 2]
    with attach(model, SEEN_BY[kernel], kernel=kernel) as handle:
        exact = step()
        cast = kernels.as_autocast
        monkeypatch.setattr(
            kernels, "as_autocast", lambda *x: (seen.append([y.dtype for y in x]), cast(*x))[1]
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = step()
        assert handle.summary().to_dict()["kernels"] == [kernel]
    assert seen == [[torch.float32, torch.float32, torch.bfloat16]] * wan.LAYERS
    for one, other in zip(found, exact, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).norm() < 0.05 * other.norm()
