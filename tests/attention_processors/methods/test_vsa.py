"""Video sparse attention: held to slow loops, and its gate in a model, eager and in graphs."""

import math
from functools import partial

import pytest
import torch
from support import wan
from support.checks import assert_no_worse
from support.qkv import RAGGED, random_qkv
from support.tiny import cases_of
from torch import nn

import gen_accel
from gen_accel import VSA, Radial, VideoShape, attach, attention
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.seam import add_tap
from gen_accel.pipelines import SilentBranch

SMALL = VSA(0.3, (2, 3, 4))
quiet = pytest.mark.filterwarnings("ignore::gen_accel.pipelines.SilentBranch")


def tiles_of(method, video, first=0):
    """The tokens of each tile, in raster order of the tiles, and of each part of the text.

    Args:
        first: place of the video's first token; the text comes before it, or else last.
    """
    frames, rows, columns = (
        [range(i, min(i + side, size)) for i in range(0, size, side)]
        for size, side in zip(video.grid, method.tile, strict=True)
    )
    found = [
        [first + (f * video.height + r) * video.width + c for f in fs for r in rs for c in cs]
        for fs in frames
        for rs in rows
        for cs in columns
    ]
    block, start = math.prod(method.tile), 0 if first else video.video_tokens
    text = []
    for part in video.parts or (video.text,):
        text += [[*range(start, start + part)][i : i + block] for i in range(0, part, block)]
        start += part
    return found, text


def by_loops(method, q, k, v, gate, video, first=0):
    """The definition, of one head: q, k, v and gate (N, D)."""
    of_video, text = tiles_of(method, video, first)
    tiles, scale, out = of_video + text, q.shape[1] ** -0.5, torch.zeros_like(q)
    mq, mk, mv = (torch.stack([x[tile].mean(0) for tile in tiles]) for x in (q, k, v))
    scores, text = mq @ mk.T * scale, [tile in text for tile in tiles]
    of_video = range(len(of_video))
    count = math.ceil(method.critical * len(of_video))
    coarse = scores.softmax(1) @ mv
    for i, tile in enumerate(tiles):
        best = sorted(of_video, key=lambda j: -scores[i, j])[:count]
        kept = [j for j in range(len(tiles)) if text[i] or text[j] or j in best]
        keys = [t for j in kept for t in tiles[j]]
        fine = (q[tile] @ k[keys].T * scale).softmax(1) @ v[keys]
        out[tile] = fine + gate[tile] * coarse[i]
    return out


PARTS = VideoShape(*RAGGED.grid, RAGGED.text, (2, RAGGED.text - 3, 1))


@pytest.mark.parametrize("video", [RAGGED, PARTS], ids=["one text", "three parts"])
@pytest.mark.parametrize("method", [SMALL, VSA(0.5, (4, 4, 4)), VSA(1.0, (1, 2, 7))], ids=str)
def test_equals_the_definition(method, video):
    q, k, v = random_qkv(RAGGED, dtype=torch.float64)
    gate = random_qkv(RAGGED, seed=1, dtype=torch.float64)[0]
    heads = zip(*(x.flatten(0, 1) for x in (q, k, v, gate)), strict=True)
    expected = torch.stack([by_loops(method, *head, video) for head in heads]).view(q.shape)
    run = partial(attention, video=video, method=method, kernel="reference")
    assert torch.allclose(run(q, k, v, gate=gate), expected, rtol=0, atol=1e-12)
    low = [x.float() for x in (q, k, v)]
    for kernel in ("auto", "gather"):
        found = attention(*low, video=video, method=method, kernel=kernel, gate=gate.float())
        assert_no_worse(found, run(*low, gate=gate.float()), expected)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimax_h3", "minimax_h3_key_frames", "minimax_h3_references"])
def test_the_packed_sequence_of_minimax_h3(name):
    """Words, key frames or references, and sound are exact, and tiled each by itself; all have a
    gate. Outputs and gradients of each attention equal the definition, in the model's order."""
    case = {case.name: case for case in cases_of("minimax_h3")}[name]
    model, grid = case.build().double(), (3, 5, 7)
    given = case.inputs(*grid, batch=1)
    given = {n: x.double() if "hidden_states" in n else x for n, x in given.items()}
    start = len(given["token_tags"]) - math.prod(grid)
    tags = given["token_tags"][:start].unique_consecutive(return_counts=True)[1]
    video = VideoShape(*grid, start, tuple(tags.tolist()))
    assert len(video.parts) == {"minimax_h3": 2, "minimax_h3_key_frames": 3}.get(name, 5)
    seen = []

    def look(call, out, gate):
        values = gate(call.hidden_states).unflatten(-1, call.q.shape[2:])
        inputs = call.q, call.k, call.v, *gate.parameters()
        one, two, three, own = (x[0].transpose(0, 1) for x in (*inputs[:3], values))
        heads = zip(one, two, three, own, strict=True)
        slow = torch.stack([by_loops(SMALL, *head, video, start) for head in heads])
        both = out, slow.transpose(0, 1)[None]
        to = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        grads = [torch.autograd.grad(x, inputs, to, retain_graph=True) for x in both]
        seen.append((*both, *grads))
        return out

    gates = [*opened(model).branches.values()]
    for site, gate in zip(family_of(model).self_attentions(model), gates, strict=True):
        add_tap(site.module, "dispatch_attention_fn", partial(look, gate=gate))
    model(**given)
    assert len(seen) == len(gates) == 2
    for found, expected, *grads in seen:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for own, slow in zip(*grads, strict=True):
            torch.testing.assert_close(own, slow, rtol=0, atol=1e-11)


def test_a_gate_of_ones_is_the_coarse_part_once_and_of_zeros_none():
    q, k, v = random_qkv(RAGGED)
    run = partial(attention, q, k, v, video=RAGGED)
    once = VSA(0.3, (2, 3, 4), "once")
    ones, zeros = torch.ones_like(q), torch.zeros_like(q)
    assert torch.equal(run(method=SMALL, gate=ones), run(method=once))
    assert torch.equal(run(method=SMALL, gate=zeros), run(method=SMALL))


@pytest.mark.parametrize(
    ("method", "gate", "said"),
    [
        (Radial(), torch.ones(2, 2, 95, 8), r"^Radial has no gate"),
        (SMALL, torch.ones(2, 2, 95, 7), r"^gate must be a tensor \(2, 2, 95, 8\), as q, got"),
        (SMALL, 1.0, r"^gate must be a tensor .*, got float$"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(method, gate, said):
    with pytest.raises(ValueError, match=said):
        attention(*random_qkv(RAGGED), video=RAGGED, method=method, gate=gate)


def opened(model, method=SMALL, **options):
    """The model with random gates."""
    handle = attach(model, method, **options)
    for place, gate in enumerate(handle.branches.values()):
        torch.manual_seed(place)
        for x in gate.parameters():
            nn.init.normal_(x, std=0.3)
    return handle


@quiet
def test_the_gate_reads_what_q_is_projected_from():
    model, seen = wan.transformer(), []
    handle = opened(model)
    gates = [*handle.branches.values()]
    for site, gate in zip(family_of(model).self_attentions(model), gates, strict=True):
        add_tap(
            site.module,
            "dispatch_attention_fn",
            lambda call, out, gate=gate: seen.append((call, out, gate)) or out,
        )
    with torch.no_grad():
        wan.forward(model)
    assert len(seen) == wan.LAYERS
    for call, out, gate in seen:
        values = gate(call.hidden_states).unflatten(-1, call.q.shape[2:])
        parts = [x.transpose(1, 2) for x in (call.q, call.k, call.v, values)]
        expected = attention(
            *parts[:3], video=VideoShape(5, 9, 11), method=SMALL, gate=parts[3]
        ).transpose(1, 2)
        assert torch.allclose(out, expected, atol=1e-6)


def test_methods_without_a_gate_are_not_given_hidden_states():
    model, seen = wan.transformer(), []
    attach(model, Radial())
    module = family_of(model).self_attentions(model)[0].module
    add_tap(module, "dispatch_attention_fn", lambda call, out: seen.append(call) or out)
    wan.forward(model)
    assert [call.hidden_states is None and call.gate is None for call in seen] == [True]


def test_a_gate_of_zeros_says_so_and_costs_nothing(monkeypatch):
    model = wan.transformer()
    with pytest.warns(SilentBranch, match=r"^the gate of VSA is still silent.*load_processors"):
        handle = attach(model, SMALL)
    for gate in handle.branches.values():
        monkeypatch.setattr(gate, "forward", None)
    with torch.no_grad():
        wan.forward(model)


@quiet
def test_gates_train_are_saved_and_loaded(tmp_path):
    model = wan.transformer()
    handle = opened(model)
    found = wan.gradients(model)
    wanted = {name for name in found if "to_gate_compress" in name}
    assert len(wanted) == 2 * wan.LAYERS
    assert all(found[name].any() for name in wanted)
    with torch.no_grad():
        expected = wan.forward(model)
    gen_accel.save_processors(handle, tmp_path)
    again = wan.transformer()
    gen_accel.load_processors(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(wan.forward(again), expected)


@quiet
@pytest.mark.nightly
@pytest.mark.usefixtures("one_thread")
def test_a_graph_holds_the_gate_and_gives_it_gradients():
    torch._dynamo.reset()
    model = wan.transformer()
    handle = opened(model)
    expected = wan.gradients(model)
    with torch.no_grad():
        out = wan.forward(model)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(wan.forward(model), out, rtol=1e-5, atol=1e-5)
    found = wan.gradients(model)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
    assert handle.is_attached
    torch._dynamo.reset()
