"""Attention over chunks: a clip at once against step by step, its zones, keys turned in time."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.exported import model_of_family
from torch import Tensor

from gen_accel import attach
from gen_accel.attention_processors import Piecewise, Radial
from gen_accel.attention_processors.attached.attachment import extend_attention
from gen_accel.attention_processors.attached.layer import AttentionExtension
from gen_accel.attention_processors.families import families, family_of
from gen_accel.pipelines.long_video.chunks import (
    ChunkedAttention,
    Clip,
    History,
    Seen,
    grid_means,
    salient,
)
from gen_accel.pipelines.zones import MIDDLES, Zones
from gen_accel.video import VideoShape, temporal_patch

STREAMED = sorted(one.name for one in families() if one.serves("streams"))
GRID = VideoShape(2, 6, 8)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@cache
def stirred(name: str):
    """A model of a family in which the attention matters: modulations are not near 0."""
    model, g = model_of_family(name).eval(), torch.Generator().manual_seed(1)
    for key, x in model.named_parameters():
        if "scale_shift_table" in key or ".norm1.linear.weight" in key:
            x.data.normal_(generator=g)
    return model


@pytest.fixture(scope="module")
def wan():
    return stirred("wan")


def rows_of(model, latents: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
    """One row for each chunk, (rows, C, f, h, w), by the family's call."""
    return family_of(model).predict(model, latents, times, told)


def texts_of(family, config, *shape: int) -> dict[str, Tensor]:
    """Conditions of random texts, of other lengths where a mask hides their padding."""
    found, rows = {}, math.prod(shape)
    for seed, (name, one) in enumerate(family.tiny_conditions(config, 5).items()):
        if "mask" in name:
            lengths = torch.arange(rows).view(*shape, 1) % 3 + 2
            found[name] = (torch.arange(5) < lengths).to(one.dtype)
        else:
            found[name] = randn(*shape, *one.shape, seed=5 + seed)
    if family.training.takes_fps:
        found["fps"] = torch.tensor([20.0, 30.0])[: shape[0], None].expand(shape)
    return found


class Case:
    """A clip of several chunks, clean and noisy, and what the model is told of it."""

    def __init__(self, model, chunks: int = 6, frames: int = 1, clips: int = 1):
        family = family_of(model)
        C = family.latent_channels(model.config)
        size = clips, chunks, C, frames * temporal_patch(model), 8, 12
        self.model, self.chunks, self.clips = model, chunks, clips
        self.clean, self.noisy = randn(*size, seed=1), randn(*size, seed=2)
        self.context = torch.rand(clips, chunks, generator=torch.Generator().manual_seed(3)) / 3
        self.levels = torch.rand(clips, chunks, generator=torch.Generator().manual_seed(4))
        self.told = texts_of(family, model.config, clips, chunks)

    def begin(self, attention: ChunkedAttention) -> None:
        attention.forget()
        fps = self.told.get("fps")
        attention.fps = None if fps is None else fps[:, 0]

    def at_once(self, attention: ChunkedAttention, zones: Zones) -> Tensor:
        self.begin(attention)
        clip = attention.now = Clip(self.clips, self.chunks, zones)
        pairs = (self.clean, self.noisy), (self.context, self.levels)
        told = {name: clip.rows(x, x) for name, x in self.told.items()}
        return clip.noisy(rows_of(self.model, *(clip.rows(*pair) for pair in pairs), told))

    def one_by_one(self, attention: ChunkedAttention, first: int = 0) -> Tensor:
        """
        Args:
            first: chunk from which predictions are made; those before are only kept.
        """
        self.begin(attention)
        found = []
        for i in range(self.chunks):
            told = {name: x[:, i] for name, x in self.told.items()}
            if i >= first:
                with attention.chunk("cond"):
                    found.append(rows_of(self.model, self.noisy[:, i], self.levels[:, i], told))
            with attention.chunk("cond", keeps=True):
                rows_of(self.model, self.clean[:, i], self.context[:, i], told)
        return torch.stack(found, 1)


ZONES = [
    Zones(1, window, sink, middle, remembered=2)
    for window in (1, 2)
    for sink in (0, 1)
    for middle in MIDDLES
]


@torch.no_grad()
@pytest.mark.turns(5)
@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("zones", ZONES, ids=str)
def test_all_chunks_at_once_are_the_chunks_one_by_one(name, zones):
    """To the bit, whether those before were predicted too or only kept."""
    model = stirred(name)
    case, attention = Case(model, clips=2), ChunkedAttention(model, zones)
    try:
        found = case.one_by_one(attention)
        torch.testing.assert_close(case.at_once(attention, zones), found, rtol=0, atol=2e-5)
        again = case.one_by_one(attention, first=3)
        assert torch.equal(again, found[:, 3:])
    finally:
        attention.remove()


@torch.no_grad()
def test_a_window_over_all_chunks_is_the_model_under_a_mask(wan):
    """The stock model over a whole clip, in which each chunk sees itself and those before it."""
    case = Case(wan, chunks=4)
    attention = ChunkedAttention(wan, Zones(1, window=4))
    text = {name: x[:, :1].expand(-1, 4, -1, -1) for name, x in case.told.items()}
    case.told = text
    case.context = case.levels = torch.full((1, 4), 0.5)
    case.noisy = case.clean
    found = case.one_by_one(attention)
    attention.remove()
    whole = case.clean.transpose(1, 2).flatten(2, 3)

    def causal(attend, q, k, v, video):
        number = torch.arange(q.shape[2]) // (q.shape[2] // 4)
        seen = number[:, None] >= number
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attend.call.scale)

    remove = extend_attention(wan, AttentionExtension("causal", 0, around=causal))
    wanted = rows_of(wan, whole, case.levels[:, 0], {name: x[:, 0] for name, x in text.items()})
    remove()
    wanted = wanted.unflatten(2, (4, 1)).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", STREAMED)
def test_keys_are_turned_as_the_models_own_table_turns_them(name):
    """A clip that repeats some latent frames after its first: their keys are those before, turned.
    The first may be of fewer pixel frames, and so nearer to the second."""
    model = model_of_family(name).eval()
    if name.startswith("ltx"):  # of 10,000, whose angles float32 rounds by 1e-3 rad
        model.rope.theta = 50.0
    family, half = family_of(model), 2
    part = randn(1, family.latent_channels(model.config), half * temporal_patch(model), 8, 12)
    clip = torch.cat([part[:, :, : temporal_patch(model)], part, part], 2)
    text = family.tiny_conditions(model.config, 5)
    given = {name: x[None] for name, x in text.items()}
    fps = torch.tensor([20.0]) if family.training.takes_fps else None
    if fps is not None:
        given["fps"] = fps
    seen = []

    def look(attend, q, k, v, video):
        seen.append((k, video))
        return attend(q, k, v, video)

    remove = extend_attention(model, AttentionExtension("look", 0, around=look))
    family.predict(model, clip, torch.full((1,), 0.5), given)
    remove()
    k, video = seen[0]
    frame = video.height * video.width
    first, second = k[:, :, frame : video.video_tokens].split(half * frame, 2)
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(family.turned(model, first, half, fps), second, rtol=0, atol=2e-5)
    back = family.turned(model, second, -half, fps)
    torch.testing.assert_close(back, first, rtol=0, atol=2e-5)


def test_turns_add_up():
    model = model_of_family("wan")
    family, keys = family_of(model), randn(2, 2, 12, 16, seed=8)
    twice = family.turned(model, family.turned(model, keys, 3), 4)
    torch.testing.assert_close(twice, family.turned(model, keys, 7), rtol=0, atol=1e-6)


def plain(keys: Tensor, frames: int) -> Tensor:
    return keys


def chunk(seed: int) -> tuple[Tensor, Tensor]:
    return randn(2, 3, GRID.video_tokens, 8, seed=seed), randn(
        2, 3, GRID.video_tokens, 8, seed=-seed
    )


def filled(zones: Zones, chunks: int) -> History:
    history = History(zones, plain)
    for i in range(chunks):
        history.push(*chunk(i + 1), GRID)
    return history


@pytest.mark.parametrize("middle", MIDDLES)
def test_what_is_kept_grows_no_more_once_the_cache_is_full(middle):
    zones = Zones(2, window=2, sink=1, middle=middle, remembered=3)
    sizes = []
    for count in (6, 7, 12):
        history = filled(zones, count)
        seen = history.seen()
        sizes.append((history.numbers, seen.keys.shape[2]))
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][1] + GRID.video_tokens == zones.tokens(GRID)


def test_zones_are_the_oldest_first():
    """The middle's two newest, the first chunk, and the window."""
    seen = filled(Zones(2, window=2, sink=1, middle="all", remembered=2), 7).seen()
    wanted = torch.cat([chunk(i)[0] for i in (4, 5, 1, 6, 7)], 2)
    torch.testing.assert_close(seen.keys, wanted, rtol=0, atol=0)
    assert seen.logs is None


@pytest.mark.parametrize("pool", [salient, lambda one: grid_means(one, GRID)])
def test_counts_add_up_to_the_tokens_and_weighted_means_to_theirs(pool):
    k, v = chunk(3)
    kept = pool(Seen(k, v))
    counts = kept.logs.exp()
    assert counts.sum().item() == pytest.approx(GRID.video_tokens, rel=1e-6)
    for whole, part in ((k, kept.keys), (v, kept.values)):
        torch.testing.assert_close(
            (part * counts[:, None]).sum(2), whole.sum(2), atol=1e-4, rtol=0
        )


def test_salient_tokens_are_those_unlike_the_others():
    k, v = chunk(3)
    v = 0.01 * v
    v[0, :, 17] += 5.0
    v[1, :, 60] -= 4.0
    kept = salient(Seen(k, v))
    for row, place in ((0, 17), (1, 60)):
        near = (kept.keys[row].transpose(0, 1) == k[row, :, place]).all(-1).all(-1)
        assert near[:-1].any()


def test_cells_of_one_token_are_exact(monkeypatch):
    monkeypatch.setattr("gen_accel.pipelines.long_video.chunks.CELL", 1)
    k, v = chunk(2)
    kept = grid_means(Seen(k, v), GRID)
    torch.testing.assert_close(kept.keys, k)
    torch.testing.assert_close(kept.values, v)
    assert not kept.logs.any()


def test_a_mean_of_equal_keys_is_the_keys_themselves():
    """Attention to one key that counts n times is attention to n equal ones."""
    k, v = chunk(2)
    k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    kept, q = salient(Seen(k, v)), randn(2, 3, 5, 8, seed=9)
    own = randn(2, 3, 7, 8, seed=10)
    logs = F.pad(kept.logs, (0, 7))[None, None, None]
    found = F.scaled_dot_product_attention(
        q, torch.cat([kept.keys, own], 2), torch.cat([kept.values, own], 2), attn_mask=logs
    )
    wanted = F.scaled_dot_product_attention(q, torch.cat([k, own], 2), torch.cat([v, own], 2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Piecewise(1.0, tile=(1, 4, 4), block_q=16, block_k=16),
        Radial(block=16, tile_frames=1, tile_side=4),
    ],
    ids=["piecewise", "radial"],
)
@torch.no_grad()
def test_a_method_runs_inside_the_exact_zones(wan, method):
    zones = Zones(1, window=2, sink=1)
    case = Case(wan, chunks=5)
    attention = ChunkedAttention(wan, zones)
    dense = case.one_by_one(attention)
    attention.remove()
    with attach(wan, method) as handle:
        attention = ChunkedAttention(wan, zones)
        sparse = case.one_by_one(attention)
        attention.remove()
        density = handle.summary().density
    if isinstance(method, Piecewise):
        torch.testing.assert_close(sparse, dense, rtol=0, atol=2e-5)
        assert density == pytest.approx(1)
    else:
        assert torch.isfinite(sparse).all()
        assert 0.2 < density < 1


@torch.no_grad()
def test_a_middle_is_refused_beside_a_method(wan):
    with attach(wan, Piecewise(0.5)):
        attention = ChunkedAttention(wan, Zones(1, window=1, middle="salient"))
        with pytest.raises(ValueError, match="middle none"):
            Case(wan).one_by_one(attention)
        attention.remove()


def test_gradients_reach_what_earlier_chunks_were_made_of(wan):
    zones = Zones(1, window=1, sink=1, middle="salient", remembered=2)
    case, attention = Case(wan, chunks=5), ChunkedAttention(wan, zones)
    case.clean.requires_grad_()
    out = case.at_once(attention, zones)
    attention.remove()
    out[:, 4].sum().backward()
    reached = case.clean.grad.flatten(2).abs().sum(2)[0]
    assert (reached[:4] > 0).all()
    assert not reached[4]


@torch.no_grad()
def test_the_stock_model_is_back_afterwards(wan):
    case = Case(wan, chunks=2)
    told = {name: x[:, 0] for name, x in case.told.items()}
    given = case.noisy[:, 0], case.levels[:, 0], told
    before = rows_of(wan, *given)
    attention = ChunkedAttention(wan, Zones(1))
    case.one_by_one(attention)
    attention.remove()
    assert torch.equal(rows_of(wan, *given), before)


def test_it_goes_alone(wan):
    other = extend_attention(wan, AttentionExtension("look", 0))
    with pytest.raises(ValueError, match="look is on this model"):
        ChunkedAttention(wan, Zones(1))
    other()
    attention = ChunkedAttention(wan, Zones(1))
    with pytest.raises(ValueError, match="stream is on this model"):
        ChunkedAttention(wan, Zones(1))
    attention.remove()


@torch.no_grad()
def test_another_length_than_a_chunks_is_refused(wan):
    attention = ChunkedAttention(wan, Zones(2))
    with pytest.raises(ValueError, match=r"2 latent frames after patchify.* with 1"):
        Case(wan).one_by_one(attention)
    attention.remove()


@pytest.mark.parametrize(
    "wrong", [{"frames": 0}, {"window": 0}, {"sink": -1}, {"middle": "some"}, {"remembered": 0}]
)
def test_wrong_zones_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Zones(**wrong)
