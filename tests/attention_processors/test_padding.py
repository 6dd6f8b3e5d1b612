"""Padded text, whose equal keys are counted once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_no_worse
from support.methods import RADIAL
from support.tiny import cases_of
from support.wan import forward, inputs, processors, transformer

from gen_accel import Dense, Schedule, attach
from gen_accel.attention_processors.padding import attend_once, equal_tail
from gen_accel.attention_processors.seam import Call, Parallel, TappedProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = 3  # tokens of text before the padding


def qkv(keys=12, words=(3, 5), dtype=torch.float64, queries=37):
    """(B, N, H, D), with the last keys and values of each sample equal."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(words), n, 2, 8, generator=g) for n in (queries, keys, keys))
    for x in (k, v):
        for row, count in zip(x, words, strict=True):
            row[count:] = row[count : count + 1].clone()
    return [x.to(dtype) for x in (q, k, v)]


def whole(q, k, v, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def call_of(q, k, v, **facts):
    facts = {"scale": 0.4, "refused": [], **facts}
    return Call(q, k, v, stock=lambda: whole(q, k, v, 0.4), **facts)


@pytest.mark.parametrize(
    ("words", "tail"), [((3, 5), 7), ((12, 3), 1), ((0, 0), 12), ((11, 11), 1), ((10, 10), 2)]
)
def test_the_shortest_run_of_equal_keys_counts(words, tail):
    _, k, v = qkv(words=words)
    assert equal_tail(k, v) == tail or tail == 1 > equal_tail(k, v)
    assert equal_tail(v, k) == equal_tail(k, v)


def test_keys_or_values_or_one_head_that_differ_end_it():
    _, k, v = qkv()
    for x, (row, token, head) in ((k, (0, 9, 1)), (v, (1, 9, 0))):
        x[row, token, head, 5] += 1e-6
        assert equal_tail(k, v) == 2
        x[row, token, head, 5] -= 1e-6
    v[0, -1, 0, 0] = torch.nan
    assert equal_tail(k, v) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_answer_and_gradients_of_all_keys(dtype):
    exact = [x.requires_grad_() for x in qkv(keys=40)]
    low, ours = ([x.detach().to(dtype).requires_grad_() for x in exact] for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in low]
    outs = whole(*wide, 0.4), whole(*low, 0.4)
    found, left = attend_once(call_of(*ours))
    assert left == 6
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    for out in (*outs, found):
        (out.double() * weight.double()).sum().backward()
    more = 1e-14 if dtype == torch.float64 else 0.0
    assert_no_worse(found, outs[1], outs[0], more=more)
    for one, plain, right in zip(ours, low, wide, strict=True):
        assert_no_worse(one.grad, plain.grad, right.grad, more=more)


def test_what_it_leaves_to_the_model():
    q, k, v = qkv()
    assert attend_once(call_of(q, k, v)) is not None
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    for facts in ({"mask": mask}, {"refused": ["is_causal"]}, {"parallel": Parallel(None, None)}):
        assert attend_once(call_of(q, k, v, **facts)) is None
    assert attend_once(call_of(*qkv(words=(7, 3)))) is None  # more than half of the keys left
    assert attend_once(call_of(*(x.to("meta") for x in (q, k, v)))) is None
    calls = torch.vmap(lambda x: call_of(x, x, x).stock() if attend_once(call_of(x, x, x)) else x)
    assert torch.equal(calls(k[None]), k[None])


def test_under_autocast_it_is_what_torch_gives():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend_once(call_of(q, k, v))
        low = whole(q, k, v, 0.4)
    assert found.dtype == low.dtype == torch.bfloat16
    halves = [x.bfloat16().double() for x in (q, k, v)]
    assert_no_worse(found, low, whole(*halves, 0.4))


def padded(given):
    """Arguments of a forward pass whose texts end in equal tokens."""
    text = given["encoder_hidden_states"].repeat(1, 4, 1)
    text[:, WORDS:] = 0
    return given | {"encoder_hidden_states": text}


def output(model, given):
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def test_a_model_with_padded_text():
    model, given = transformer(), padded(inputs())
    stock = output(model, given)
    with attach(model, Dense()):
        assert torch.equal(output(model, given), stock)
    before = processors(model)
    with attach(model, RADIAL, padding_once=False) as handle:
        plain = output(model, given)
        assert "padded" not in str(handle.summary())
    with attach(model, RADIAL) as handle:
        found = output(model, given)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, plain)
        told = "keys of padded text, equal ones once: 24 as 4 in 2 calls"
        assert told in str(handle.summary())
        assert handle.summary().to_dict()["padding"] == told
        with handle.paused():
            assert torch.equal(output(model, given), stock)
        twin = copy.deepcopy(model)
        assert torch.equal(output(twin, given), found)
        assert told in str(handle.summary())  # the copy counts for itself
    assert torch.equal(output(model, given), stock)
    assert [*map(id, processors(model))] == [*map(id, before)]
    with attach(model, RADIAL, schedule=Schedule(dense_steps=9)) as handle:
        assert torch.equal(output(model, given), stock)
        assert not handle.summary().padding
    options = {"schedule": Schedule(dense_steps=9), "dense_kernel": "auto"}
    with attach(model, RADIAL, **options) as handle:
        torch.testing.assert_close(output(model, given), stock, rtol=1e-4, atol=1e-5)
        assert told in str(handle.summary())
    with attach(model, Dense(), padding_once=True) as handle:
        torch.testing.assert_close(output(model, given), stock, rtol=1e-4, atol=1e-5)
        assert told in str(handle.summary())


def test_text_without_padding_is_the_models_own_call():
    model = transformer()
    with attach(model, RADIAL, padding_once=False):
        plain = forward(model)
    with attach(model, RADIAL) as handle:
        assert torch.equal(forward(model), plain)
        assert not handle.summary().padding


def test_an_attachment_that_takes_over_decides():
    model, given = transformer(), padded(inputs())
    stock = output(model, given)
    first = attach(model, RADIAL)
    with attach(model, Dense()):
        assert torch.equal(output(model, given), stock)
        assert not any(type(p) is TappedProcessor for p in processors(model))
    first.detach()
    assert torch.equal(output(model, given), stock)


def test_in_a_graph_the_model_attends_itself():
    model, given = transformer(), padded(inputs())
    with attach(model, RADIAL, padding_once=False):
        plain = output(model, given)
    with attach(model, RADIAL):
        model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(output(model, given), plain, rtol=1e-4, atol=1e-5)


def test_training_through_it():
    model, given = transformer(), padded(inputs())
    grads = []
    for once in (False, True):
        with attach(model, Dense(), schedule=Schedule(), padding_once=once):
            model.zero_grad()
            model(**given, return_dict=False)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, plain in zip(*grads, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["wan", "cosmos", "pixart"])
def test_other_families(family):
    """By content alone; where a mask hides the padding, nothing is counted."""
    for case in cases_of(family)[:1]:
        model, given = case.build(), padded(case.inputs(*case.grids[-1]))
        masked = [name for name in given if name.endswith("attention_mask")]
        if masked:
            given[masked[0]] = given[masked[0]].new_ones(given["encoder_hidden_states"].shape[:2])
        with torch.no_grad():
            stock = case.call(model, given)
            with attach(model, Dense(), padding_once=True) as handle:
                found = case.call(model, given)
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)
        assert bool(handle.summary().padding) is not bool(masked), case.name
