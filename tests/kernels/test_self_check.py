"""The self-check: what it blames on a kernel, what on the model, and what "auto" does then."""

import warnings

import pytest
import torch
from support.problems import RESTS, random_plan, with_rest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gen_accel import kernels
from gen_accel.kernels import gather, reference
from gen_accel.kernels.self_check import NotFinite, SelfCheck, check_rows
from gen_accel.plan import Plan, Rest


@pytest.fixture
def erring(monkeypatch):
    """Make `gather` answer half as much again, and "auto" try it first."""
    right = gather.kernel.forward
    monkeypatch.setattr(gather.kernel, "forward", lambda *x, **options: 1.5 * right(*x, **options))
    monkeypatch.setattr(kernels, "preference", lambda facts: {"gather": "", "reference": ""})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numbers_of_the_model_that_are_not_finite_are_named_as_its(qkv, name):
    plan = random_plan(torch.device("cpu"))
    tensors = dict(zip("qkv", qkv(plan.tokens), strict=True))
    tensors[name][0, 0, 3, 5] = torch.inf
    out = torch.zeros_like(tensors["q"])
    said = rf"{name} of head 0, torch.float32 on cpu, holds NaN or inf in 1 of [\d,]+ numbers"
    with pytest.raises(NotFinite, match=said):
        check_rows(*tensors.values(), plan, out, scale=0.3, name="gather")


def test_where_it_may_fall_back_it_warns_once_and_goes_on(qkv, erring):
    plan, known, chosen = random_plan(torch.device("cpu")), {}, []
    tensors = qkv(plan.tokens)
    options = {"scale": 0.3, "report": chosen.append}
    check = SelfCheck(known, "this call", falls_back=True)
    with pytest.warns(UserWarning, match="'gather' errs by .* going on with another kernel"):
        out = kernels.run(*tensors, plan, **options, self_check=check)
    assert torch.equal(out, reference.kernel.forward(*tensors, plan, scale=0.3))
    with warnings.catch_warnings(action="error"):
        kernels.run(*tensors, plan, **options, self_check=check)
    assert [one.kernel for one in chosen] == ["reference"] * 2
    assert all("errs by" in one.refused["gather"][0] for one in chosen)


def test_a_named_kernel_that_errs_is_refused_each_time(qkv, erring):
    plan, known = random_plan(torch.device("cpu")), {}
    check = SelfCheck(known, "this call", falls_back=False)
    for _ in range(2):
        with pytest.raises(kernels.SelfCheckFailed, match="'gather' errs by"):
            kernels.run(*qkv(plan.tokens), plan, scale=0.3, kernel="gather", self_check=check)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_may_be_rounded_as_tensor_cores_take_them(dtype, qkv):
    """Over rows of 4,096 keys, whose errors in sum outgrow the rounding of the result."""

    plan = Plan(torch.arange(4096), torch.ones(1, 1, 1, 1, dtype=torch.bool), 4096, 4096)
    q, k, v = qkv(4096, dtype, batch=1, heads=1)
    weights = (q.float() @ k.float().mT * 0.3).softmax(-1)
    out = (weights.to(dtype).float() @ v.float()).to(dtype)
    check_rows(q, k, v, plan, out, scale=0.3, name="some")


@pytest.mark.parametrize("kernel", ["gather", "native", "triton"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
def test_numbers_that_are_not_finite_come_out_where_the_reference_has_them(
    which, number, kernel, qkv
):
    plan = random_plan(torch.device("cpu"))
    tensors = qkv(plan.tokens, batch=1, heads=1)
    facts = kernels.facts_of(*tensors, plan)
    if reasons := kernels.unsupported(kernel, facts):
        pytest.skip("; ".join(reasons))
    tensors[which][0, 0, 7, 2] = number
    want, out = (
        kernels.kernel_of(name).forward(*tensors, plan, scale=0.3)
        for name in ("reference", kernel)
    )
    assert want.isnan().any()
    assert torch.equal(out.isnan().any(-1), want.isnan().any(-1))
    torch.testing.assert_close(out, want, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_the_reference_is_zero_only_where_a_row_sees_nothing(qkv):
    plan = random_plan(torch.device("cpu"))
    plan = plan.changed(keep=plan.keep & (torch.arange(plan.keep.shape[2]) > 0)[:, None])
    q, k, v = qkv(plan.tokens, batch=1, heads=1)
    blind = ~reference.pairs(plan).any(-1)[0, 0, plan.places]
    k[0, 0, :, 0] = torch.nan
    out = reference.kernel.forward(q, k, v, plan, scale=0.3)[0, 0]
    assert blind.any()
    assert (out[blind] == 0).all()
    assert out[~blind].isnan().all()


class TestRest:
    """Plans that pool what they do not keep."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("asked", RESTS)
    def test_a_right_answer_passes(self, asked, dtype, qkv):
        for shape in ({"batch": 2, "heads": 2}, {"heads": 2, "block_q": 8, "block_k": 32}):
            plan = random_plan(torch.device("cpu"), **shape, rest=RESTS[asked])
            check = SelfCheck({}, "this call", falls_back=False)
            tensors = [x.cpu() for x in qkv(plan.tokens, dtype)]
            options = {"scale": 0.3, "kernel": "gather", "self_check": check}
            kernels.run(*tensors, plan, **options)
            assert check.known == {("this call", "gather"): None}

    @pytest.mark.parametrize(
        ("asked", "other"),
        [
            (Rest("query"), None),
            (Rest("query"), Rest("key")),
            (Rest("key"), Rest("query")),
            (Rest("key"), Rest("key", "first")),
            (Rest("key", "first"), Rest("key")),
            (Rest("query", "second"), Rest("query")),
            (Rest("query"), Rest("query", "second")),
        ],
        ids=str,
    )
    def test_another_rest_is_refused(self, asked, other, qkv):
        plan = random_plan(torch.device("cpu"), heads=2, rest=asked)
        tensors = [x.cpu() for x in qkv(plan.tokens)]
        out = reference.kernel.forward(*tensors, with_rest(plan, other), scale=0.3)
        with pytest.raises(kernels.SelfCheckFailed, match="'some' errs by"):
            check_rows(*tensors, plan, out, scale=0.3, name="some")

    @pytest.mark.parametrize("head", [0, 1])
    def test_a_head_that_errs_is_found(self, head, qkv):
        plan = random_plan(torch.device("cpu"), heads=2, rest=Rest())
        tensors = [x.cpu() for x in qkv(plan.tokens)]
        out = reference.kernel.forward(*tensors, plan, scale=0.3)
        check_rows(*tensors, plan, out, scale=0.3, name="some")
        out[:, head] *= 1.001
        with pytest.raises(kernels.SelfCheckFailed, match="'some' errs by"):
            check_rows(*tensors, plan, out, scale=0.3, name="some")

    @pytest.mark.parametrize("asked", RESTS)
    def test_nothing_is_as_large_as_all_pairs(self, asked, qkv):
        S = 2048
        keep = torch.eye(S // 64, dtype=torch.bool)[None, None]
        plan = Plan(torch.arange(S), keep, 64, 64, rest=RESTS[asked])
        tensors = [x.cpu() for x in qkv(S, batch=1, heads=1)]
        out = kernels.run(*tensors, plan, scale=0.3, kernel="gather")
        largest = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                made = func(*args, **kwargs or {})
                sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
                largest.append(max(sizes, default=0))
                return made

        with Watch():
            check_rows(*tensors, plan, out, scale=0.3, name="gather")
        assert max(largest) <= S * S // 16
