"""Profiled: masses, their fit by offset, the budget, the blocks, and the file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.qkv import random_qkv

from gen_accel import Mixed, Profiled, Rule, VideoShape, attention
from gen_accel.attention_processors.attached.profiling import MassSums
from gen_accel.attention_processors.methods.masses import (
    LEVELS,
    LayerMasses,
    Masses,
    fit_offsets,
    levels_of,
    offsets_of,
    read_masses,
    shares_of,
    spread,
    tiles_of,
    tokens_of_tiles,
)
from gen_accel.attention_processors.methods.profiled import chosen_blocks
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.io import read_tensors, save_tensors
from gen_accel.kernels import reference
from gen_accel.kernels.mass import block_mass, heaviest
from gen_accel.method import Step
from gen_accel.plan import unpack

CPU = torch.device("cpu")
VIDEO = VideoShape(6, 6, 8)
TILE = (2, 2, 4)
MODEL = "WanTransformer3DModel"
BOUNDS = {"least": 0.03, "most": 0.5}


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


def made(grid=VIDEO.grid, tile=TILE, heads=2, layers=(0, 1), form="offsets"):
    """Masses of random weights, a head flatter than the one before."""
    tiles, g = tiles_of(grid, tile), torch.Generator().manual_seed(0)
    found = {}
    for layer in layers:
        base = torch.stack([bump(tiles) / (1 + head + layer) for head in range(heads)])
        base += torch.randn(base.shape, generator=g) * 0.3
        frames = torch.zeros(heads, tiles[0]).half()
        frames[:, 0] = 0.5
        scores = torch.stack([mass_by(one, grid, tile)[0] for one in base])
        scores = (scores / tokens_of_tiles(grid, tile)).log().half()
        weights = base.half() if form == "offsets" else scores
        found[layer] = LayerMasses(weights, frames, levels_of(scores))
    return Masses(MODEL, form, tile, grid, found)


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
        fitted, frames = fit_offsets(*sums_of(mass, tiles), grid, TILE)
        shape = (1, *(2 * n - 1 for n in tiles))
        levels = torch.zeros(1, LEVELS).half()
        layer = LayerMasses(fitted.view(shape).half(), frames.half(), levels)
        masses = Masses(MODEL, "offsets", TILE, grid, {0: layer})
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
    @pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.37, 0.5])
    def test_the_mean_over_heads_and_layers_is_as_asked(self, share):
        grid = (16, 16, 16)
        masses = made(grid=grid, heads=3)
        method, video = profiled(share, masses, **BOUNDS), VideoShape(*grid)
        shares = [one for n in masses.layers for one in method.for_layer(n).shares]
        assert sum(shares) / len(shares) == pytest.approx(share, rel=1e-3)
        assert min(shares) >= 0.03 - 1e-9
        assert max(shares) <= 0.5 + 1e-9
        found = [method.for_layer(n).density(video) for n in masses.layers]
        assert sum(found) / len(found) == pytest.approx(share, rel=0.01)
        assert method.density(video) == pytest.approx(share)

    def test_without_bounds_all_heads_have_the_same(self):
        for layer in (0, 1):
            assert profiled(0.2).for_layer(layer).shares == pytest.approx((0.2, 0.2))
        own = profiled(0.2, **BOUNDS).for_layer(0).shares
        assert own[0] != pytest.approx(own[1], abs=1e-3)

    def test_no_query_is_blind(self):
        keep = profiled(0.001).for_layer(0).plan(VIDEO).keep
        assert (keep.sum(-1) == 1).all()

    def test_rows_differ_by_one_block_at_most(self):
        counts = profiled(0.3).for_layer(0).plan(VIDEO).keep.sum(-1)
        assert (counts.amax(-1) - counts.amin(-1) <= 1).all()

    def test_no_other_shares_of_two_heads_lose_less(self):
        """Held to all splits of the budget, by the sum of the squares of the lost masses."""
        levels = {0: torch.linspace(0, -5, LEVELS)[None], 1: torch.linspace(0, -30, LEVELS)[None]}
        (first,), (second,) = shares_of(levels, 0.2, 0.0, 1.0).values()
        assert first + second == pytest.approx(0.4, abs=1e-4)
        assert first > second
        places = (torch.arange(LEVELS + 1, dtype=torch.float64) / LEVELS).square()

        def lost(head, share):
            mass = levels[head][0].double().exp() * places.diff()
            return 1 - mass[places[1:] <= share].sum() / mass.sum()

        def cost(share):
            return lost(0, share) ** 2 + lost(1, 0.4 - share) ** 2

        best = min(cost(share) for share in torch.linspace(0, 0.4, 201).tolist())
        assert cost(first) <= best * 1.05


class TestBlocks:
    def collected(self, form, text=0):
        video = replace(VIDEO, text=text)
        q, k, _ = random_qkv(video)
        q = 6 * q  # so that no two masses are alike
        sums = MassSums(form, 16)
        sums.add(0, q, k, video, 0.25)
        return video, q, k, sums.masses(MODEL, "")

    @pytest.mark.parametrize("text", [0, 5])
    def test_blocks_of_one_call_are_its_heaviest(self, text):
        video, q, k, masses = self.collected("blocks", text)
        T = math.prod(tiles_of(masses.grid, masses.tile))
        count = T // 3
        method = profiled(count / T, masses)
        plan = method.for_layer(0).plan(video)
        mass = block_mass(q, k, plan, scale=0.25).mean(0, keepdim=True)[:, :, :T, :T]
        counts = torch.full((1, 1, T), count)
        wanted = heaviest(mass, counts, torch.zeros(T, T, dtype=torch.bool))
        assert (plan.keep[..., :T, :T] == wanted).float().mean() > 0.99  # ties of fp16
        assert plan.keep[..., T:].all()
        assert plan.keep[..., T:, :].all()

    def test_another_grid_is_refused(self):
        _, _, _, masses = self.collected("blocks")
        with pytest.raises(ValueError, match=r"holds blocks of the grid \(6, 6, 8\), got \(6, 6,"):
            profiled(0.2, masses).for_layer(0).plan(VideoShape(6, 6, 12))

    def test_a_second_grid_is_not_summed(self):
        q, k, _ = random_qkv(VIDEO)
        sums = MassSums("offsets", 16)
        sums.add(0, q, k, VIDEO, 0.25)
        with pytest.raises(ValueError, match="a profile is of one grid"):
            sums.add(1, q, k, VideoShape(6, 8, 6), 0.25)
        with pytest.raises(ValueError, match="nothing to measure"):
            MassSums("offsets", 16).masses(MODEL, "")


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
    @pytest.mark.parametrize("form", ["offsets", "blocks"])
    def test_a_profile_through_its_file_is_the_same(self, form, tmp_path):
        method = profiled(0.2, made(form=form))
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
            ({"version": 2}, "is of version 2, not 1: measure it again"),
            ({"form": "waves"}, "form must be one of"),
            ({"tile": [2, 2]}, "tile must be three positive sizes"),
            ({"grid": [1, 1, 1]}, "is larger than the grid"),
            ({"grid": [60, 6, 8]}, "weights of layer 0 must be"),
            ({"layers": {"0": 2}}, "are not those of its layers"),
            ({"layers": {"0": 2, "1": 3}}, "differ from the ones it names"),
            ({"layers": {"x": 2}}, "must be numbers"),
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
        wrong = made().tensors()
        wrong["0.weights"] = wrong["0.weights"] * math.nan
        layers = {
            n: LayerMasses(*(wrong[f"{n}.{name}"] for name in ("weights", "frames", "levels")))
            for n in (0, 1)
        }
        with pytest.raises(ValueError, match="not finite"):
            Masses(MODEL, "offsets", TILE, VIDEO.grid, layers)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"share": 0.0}, "share must be in"),
        ({"share": 1.5}, "share must be in"),
        ({"least": 0.6}, "least and most must be"),
        ({"most": 0.05}, "least and most must be .*, got 0.1, 0.1 and 0.05"),
        ({"block": 0}, "block_q must be a whole number"),
        ({"rest": None, "centre": "key"}, "are for rest='means'"),
    ],
)
def test_options_out_of_range_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        Profiled(**options)
