"""Profiled: masses, their fit by offset, the blocks, and the file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.qkv import random_qkv

from gen_accel import Mixed, Profiled, Rule, VideoShape, attention
from gen_accel.attention_processors.attached.profiling import MassSums
from gen_accel.attention_processors.methods.profiled import (
    LayerMasses,
    Masses,
    chosen_blocks,
    fit_offsets,
    offsets_of,
    read_masses,
    spread,
    tiles_of,
    tokens_of_tiles,
)
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.io import read_tensors, save_tensors
from gen_accel.kernels import reference
from gen_accel.kernels.choosing import heaviest
from gen_accel.method import Step
from gen_accel.plan import unpack

CPU = torch.device("cpu")
VIDEO = VideoShape(6, 6, 8)
TILE = (2, 2, 4)
MODEL = "WanTransformer3DModel"


def bump(tiles):
    """Weights by offset that fall with the distance, no two alike."""
    axes = [torch.arange(1 - n, n).float() for n in tiles]
    f, r, c = torch.meshgrid(*axes, indexing="ij")
    return -(0.53 * (f - 0.2).abs() + 1.11 * (r + 0.3).abs() + 0.71 * (c - 0.1).abs())


def mass_by(weights, grid, tile, frame_gain=0.0):
    """(1, T, T) softmax over key tiles of weights by offset, the first frame of tiles gaining."""
    tiles, held = tiles_of(grid, tile), tokens_of_tiles(grid, tile)
    logits = spread(weights) + held.log()
    logits[:, : tiles[1] * tiles[2]] += frame_gain
    return logits.softmax(-1)[None]


def sums_of(mass, tiles):
    index = offsets_of(tiles).flatten()
    count = math.prod(2 * n - 1 for n in tiles)
    by_offset = mass.new_zeros(len(mass), count).index_add_(1, index, mass.flatten(1))
    return by_offset, mass.sum(1).unflatten(1, (tiles[0], -1)).sum(-1), mass.sum(-1)


def made(grid=VIDEO.grid, tile=TILE, heads=2, layers=(0, 1)):
    """Masses of random weights, a head flatter than the one before."""
    tiles, g = tiles_of(grid, tile), torch.Generator().manual_seed(0)
    found = {}
    for layer in layers:
        base = torch.stack([bump(tiles) / (1 + head + layer) for head in range(heads)])
        base += torch.randn(base.shape, generator=g) * 0.3
        frames = torch.zeros(heads, tiles[0]).half()
        frames[:, 0] = 0.5
        found[layer] = LayerMasses(base.half(), frames)
    return Masses(MODEL, tile, grid, found)


def profiled(share=0.2, masses=None, **options):
    held = masses or made()
    return Profiled(share, sha256=held.digest, **options)


class TestOffsets:
    @pytest.mark.parametrize("gain", [0.0, 1.5])
    @pytest.mark.parametrize("grid", [(6, 6, 8), (7, 5, 9)])
    def test_attention_by_offset_alone_is_the_same_on_another_grid(self, grid, gain):
        """From the sums of one grid, ragged too, to the exact mass on a smaller one."""
        tiles = tiles_of(grid, TILE)
        weights = bump(tiles)
        mass = mass_by(weights, grid, TILE, gain).double()
        layer = fit_offsets(*sums_of(mass, tiles), grid, TILE)
        masses = Masses(MODEL, TILE, grid, {0: layer})
        other = VideoShape(4, 4, 8)
        fewer = weights
        for axis, n in enumerate(tiles_of(other.grid, TILE)):
            fewer = fewer.narrow(axis, tiles[axis] - n, 2 * n - 1)
        wanted = mass_by(fewer, other.grid, TILE, gain)[0]
        held = tokens_of_tiles(other.grid, TILE)
        found = (masses.scores(0, [0], other, CPU)[0] + held.log()).exp()
        torch.testing.assert_close(found, wanted, rtol=0.06, atol=1e-3)
        share = (0.4,)
        ours = chosen_blocks((found / held).log()[None], held, share)
        assert torch.equal(ours, chosen_blocks((wanted / held).log()[None], held, share))

    def test_rows_of_mass_sum_to_one(self):
        masses = made(grid=(7, 5, 9))
        for video in (VideoShape(7, 5, 9), VideoShape(13, 8, 5, text=3), VideoShape(3, 3, 4)):
            held = tokens_of_tiles(video.grid, TILE)
            mass = (masses.scores(1, [1, 0], video, CPU) + held.log()).exp()
            torch.testing.assert_close(mass.sum(-1), torch.ones(2, len(held)))

    def test_distances_that_were_not_seen_decay(self):
        masses = made(grid=(4, 4, 8), heads=1)
        video = VideoShape(32, 4, 8)
        row = masses.scores(0, [0], video, CPU)[0].view(16, 4, 16, 4)[2, 0, :, 0]
        assert (row[4:].diff() < 0).all()
        assert (row[2 + 8] - row[2 + 4]).item() == pytest.approx(math.log(0.5), abs=0.01)


class TestBudget:
    @pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
    def test_the_density_is_as_asked(self, share):
        grid = (16, 16, 16)
        method, video = profiled(share, made(grid=grid, heads=3)), VideoShape(*grid)
        assert method.for_layer(0).density(video) == pytest.approx(share, rel=0.01)
        assert method.density(video) == pytest.approx(share)

    def test_no_query_is_blind(self):
        keep = profiled(0.001).for_layer(0).plan(VIDEO).keep
        assert (keep.sum(-1) == 1).all()

    def test_rows_differ_by_one_block_at_most(self):
        counts = profiled(0.3).for_layer(0).plan(VIDEO).keep.sum(-1)
        assert (counts.amax(-1) - counts.amin(-1) <= 1).all()

    def test_the_heaviest_tiles_of_each_row_are_kept(self):
        masses = made()
        T = math.prod(tiles_of(VIDEO.grid, TILE))
        count = T // 3
        plan = profiled(count / T, masses).for_layer(0).plan(VIDEO)
        scores = masses.scores(0, [0, 1], VIDEO, CPU)[None].exp()
        counts = torch.full((1, 1, T), count)
        wanted = heaviest(scores, counts, torch.zeros(T, T, dtype=torch.bool))
        assert torch.equal(plan.keep, wanted)

    def test_a_second_grid_is_not_summed(self):
        q, k, _ = random_qkv(VIDEO)
        sums = MassSums(16)
        sums.add(0, q, k, VIDEO, 0.25)
        with pytest.raises(ValueError, match="a profile is of one grid"):
            sums.add(1, q, k, VideoShape(6, 8, 6), 0.25)
        with pytest.raises(ValueError, match="nothing to measure"):
            MassSums(16).masses(MODEL, "")


class TestHeads:
    @pytest.mark.parametrize("text", [0, 5])
    def test_each_head_sees_its_own_blocks(self, text):
        video = replace(VIDEO, text=text)
        q, k, v = random_qkv(video)
        method = profiled(0.2, rest=None).for_layer(1)
        out = attention(q, k, v, video=video, method=method, kernel="gather")
        plan = method.plan(video)
        pairs = unpack(unpack(reference.pairs(plan), plan).mT, plan).mT
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~pairs, -torch.inf)
        torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)
        assert not torch.equal(plan.keep[0, 0], plan.keep[0, 1])

    def test_some_heads_are_those_of_the_whole(self):
        whole = profiled(0.2).for_layer(0)
        part = whole.for_heads(slice(1, 2))
        assert torch.equal(part.plan(VIDEO).keep[0, 0], whole.plan(VIDEO).keep[0, 1])
        both = part.together((part, whole.for_heads(slice(0, 1))))
        assert torch.equal(both.plan(VIDEO).keep, whole.plan(VIDEO).keep.flip(1))
        assert whole.together((whole, whole)) is None

    def test_rules_give_each_head_its_own(self):
        """Heads of two densities and of dense attention."""
        masses = made(heads=4)
        q, k, v = (torch.randn(1, 4, VIDEO.tokens, 16) for _ in range(3))
        thin, thick = profiled(0.1, masses), profiled(0.4, masses)
        rules = Rule(thin, heads=(3,)), Rule(thick, heads=(0, 2))
        mixed = Mixed(rules, 1).for_layer(1).at(Step(0, 1))
        out = attention(q, k, v, video=VIDEO, method=mixed, kernel="gather")
        for head, method in ((0, thick), (1, None), (2, thick), (3, thin)):
            one = [x[:, head : head + 1] for x in (q, k, v)]
            if method is None:
                wanted = torch.nn.functional.scaled_dot_product_attention(*one)
            else:
                own = method.for_layer(1).for_heads(slice(head, head + 1))
                wanted = attention(*one, video=VIDEO, method=own, kernel="gather")
            torch.testing.assert_close(out[:, head : head + 1], wanted, rtol=1e-4, atol=1e-5)

    def test_other_heads_are_refused(self):
        q, k, v = (torch.randn(1, 3, VIDEO.tokens, 8) for _ in range(3))
        with pytest.raises(ValueError, match="q has 3 heads, the plan is for 2"):
            attention(q, k, v, video=VIDEO, method=profiled())

    @pytest.mark.parametrize(
        ("model", "layer", "heads", "why"),
        [
            (MODEL, 1, 2, ""),
            ("LTXVideoTransformer3DModel", 1, 2, "measured on Wan.*, this is LTX.*: measure one"),
            (MODEL, 2, 2, "holds layers 0 to 1, got layer 2: measure one"),
            (MODEL, 1, 3, "holds 2 heads in layer 1, this model has 3: measure one"),
        ],
    )
    def test_another_model_is_refused_in_words(self, model, layer, heads, why):
        import re

        method = profiled()
        for one in (method, Mixed((Rule(method),), 2)):
            said = one.unfit(model, layer, heads)
            assert bool(re.search(why, said)) if why else said == ""
        assert Mixed((Rule(method, layers=(0,)),), 2).unfit("Other", 1, 2) == ""
        assert Profiled().unfit("Other", 9, 9) == ""


class TestFile:
    def test_a_profile_through_its_file_is_the_same(self, tmp_path):
        method = profiled(0.2)
        saved = method.save(tmp_path / "profile.safetensors")
        assert saved == method
        assert hash(saved) == hash(method)
        digest, wanted = method.sha256, method.for_layer(1).plan(VIDEO).keep
        again = read_masses(saved.file)
        assert again.digest == digest
        loaded = Profiled.load(saved.file, 0.2)
        assert loaded == method
        assert torch.equal(loaded.for_layer(1).plan(VIDEO).keep, wanted)
        assert method_of_file("profiled", saved_options(saved)) == method

    def test_options_without_a_file_say_what_to_do(self):
        with pytest.raises(ValueError, match=r"was in memory alone: save it, method\.save"):
            Profiled(sha256="0" * 64)
        with pytest.raises(ValueError, match="nothing was measured"):
            Profiled().save("profile.safetensors")

    def test_another_file_in_its_place_is_refused(self, tmp_path):
        path = made().save(tmp_path / "profile.safetensors")
        other = Profiled(file=str(path), sha256="1" * 64)  # not read before it is needed
        with pytest.raises(ValueError, match=r"holds another profile, .* leave out sha256"):
            other.for_layer(0)
        with pytest.raises(FileNotFoundError, match="no profile at"):
            Profiled(file=str(tmp_path / "none.safetensors"))
        with pytest.raises(ValueError, match=r"is a file called \*\.safetensors"):
            Profiled(file=str(tmp_path / "profile.pt"))

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"version": 1}, "is of version 1, not 2: measure it again"),
            ({"tile": [2, 2]}, "tile must be three positive sizes"),
            ({"grid": [1, 1, 1]}, "is larger than the grid"),
            ({"grid": [60, 6, 8]}, "weights of layer 0 must be"),
            ({"model": 3}, "model"),
        ],
    )
    def test_a_file_that_is_wrong_is_refused(self, change, why, tmp_path):
        path = made().save(tmp_path / "profile.safetensors")
        tensors, metadata = read_tensors(path)
        about = json.loads(metadata["masses"]) | change
        save_tensors(tensors, path, {"masses": json.dumps(about)})
        with pytest.raises(ValueError, match=why):
            read_masses(path)

    def test_what_is_no_profile_is_refused(self, tmp_path):
        path = tmp_path / "other.safetensors"
        save_tensors({"x": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="is no profile"):
            read_masses(path)
        path.write_bytes(b"\x80\x04pickle")
        with pytest.raises(ValueError, match="is no safetensors file"):
            read_masses(path)
        other = made()
        tensors = other.tensors() | {"x.y": torch.zeros(1)}
        save_tensors(tensors, path, {"masses": json.dumps(other.about())})
        with pytest.raises(ValueError, match=r"are not those of its layers: x\.y"):
            read_masses(path)
        nan = other.layers[0]._replace(weights=other.layers[0].weights * math.nan)
        with pytest.raises(ValueError, match="not finite"):
            Masses(MODEL, TILE, VIDEO.grid, {0: nan})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"share": 0.0}, "share must be in"),
        ({"share": 1.5}, "share must be in"),
        ({"block": 0}, "block_q must be a whole number"),
        ({"rest": None, "centre": "key"}, "are for rest='means'"),
    ],
)
def test_options_out_of_range_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        Profiled(**options)
