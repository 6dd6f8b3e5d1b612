"""The tile that `calibrate` chooses."""

import math

import pytest
import torch
from support.qkv import random_qkv
from support.wan import FRAMES, HEIGHT, WIDTH, generate, pipeline

from gen_accel import (
    Piecewise,
    Reuse,
    Schedule,
    VideoShape,
    attach,
    calibrate,
    load_processors,
    save_processors,
)
from gen_accel.attention_processors.attached import calibrate as purity

SAMPLED = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,  # one call a step
    "max_sequence_length": 16,
}


class TestTile:
    def calibrated(self, method, **schedule):
        pipe = pipeline()
        handle = attach(pipe, method, schedule=Schedule(**schedule))
        return pipe, handle, calibrate(pipe, ["a"], **SAMPLED)

    def test_the_tile_that_errs_least_is_run_and_saved(self, tmp_path):
        pipe, handle, fit = self.calibrated(Piecewise(critical=0.3, block_q=8, block_k=8))
        errors = {layer: dict(tried) for layer, tried in fit.tile.errors.items()}
        assert len(errors) == len(handle._layers) > 1
        best = {layer: min(tried, key=tried.get) for layer, tried in errors.items()}
        assert {layer.number: layer.method.tile for layer in handle._layers.values()} == best
        assert handle.method.tile == fit.tile.tile
        for tried in errors.values():
            assert len(tried) > 2
            assert all(8 <= math.prod(box) <= 16 for box in tried)
        assert str(fit).count(": ") == sum(map(len, errors.values()))
        generate(pipe)
        save_processors(handle, tmp_path)
        handle.detach()
        assert load_processors(pipe, tmp_path).method == handle.method

    def test_what_reuse_holds_takes_the_tile(self):
        inner = Piecewise(critical=0.3, block_q=8, block_k=8)
        _, handle, fit = self.calibrated(Reuse(inner))
        assert handle.method == Reuse(inner.tiled(fit.tile.tile))
        assert not handle.states._kept

    def test_its_error_is_that_of_the_method(self):
        """Of the first step, held to the same step observed by hand."""
        _, _, fit = self.calibrated(Piecewise(critical=0.3, block_q=8, block_k=8))
        pipe, seen = pipeline(), {}
        handle = attach(pipe, Piecewise(critical=0.3, tile=fit.tile.tile))

        def observe(call):
            layer, q, k, v, dense, video, run = call
            if handle.clock.step == 0:
                out = layer.method(q, k, v, video=video, kernel=run)
                error, whole = (x.double().square().sum().item() for x in (out - dense, dense))
                seen[layer.number] = math.sqrt(error / whole)

        handle.observe = observe
        pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **SAMPLED)
        assert {n: tried[0][1] for n, tried in fit.tile.errors.items()} == pytest.approx(
            seen, rel=1e-4
        )

    def test_layers_have_tiles_of_their_own(self, tmp_path):
        """Those that were not seen have the usual one, and layers past the last the last."""
        errors = purity.TileErrors(8)
        best = {0: (2, 2, 2), 1: (1, 2, 4), 3: (2, 2, 2)}
        errors.squares = dict.fromkeys(best.items(), (1.0, 1.0))
        tile = errors.fit().tile
        assert tile == ((2, 2, 2), (1, 2, 4), (2, 2, 2), (2, 2, 2))
        method = Piecewise(critical=0.3, block_q=8, block_k=8, tile=[list(box) for box in tile])
        assert method.tile == tile
        assert [method.for_layer(n).tile for n in (1, 2, 9)] == [tile[1], tile[2], tile[3]]
        assert method.least_grid == (2, 2, 4)
        pipe = pipeline()
        handle = attach(pipe, method)
        assert {x.method.tile for x in handle._layers.values() if x.number == 1} == {tile[1]}
        save_processors(handle, tmp_path)
        handle.detach()
        assert load_processors(pipe, tmp_path).method == method

    def test_only_one_step_runs(self):
        pipe, steps = pipeline(), []

        def count(pipe, step, timestep, tensors):
            steps.append(step)
            return tensors

        attach(pipe, Piecewise(critical=0.3, block_q=8, block_k=8))
        calibrate(pipe, ["a"], callback_on_step_end=count, **SAMPLED)
        assert steps == [0]

    def test_a_tile_that_is_given_stays(self):
        with pytest.raises(ValueError, match="has nothing to fit"):
            self.calibrated(Piecewise(critical=0.3, tile=(2, 2, 2)))

    def test_impurity_is_the_variance_within_boxes(self):
        video = VideoShape(5, 9, 10, text=3)
        x = random_qkv(video)[0] + torch.arange(video.tokens)[:, None] / 50
        plan = Piecewise(tile=(2, 4, 8)).plan(video)
        want = torch.zeros(2, 2, dtype=torch.float64)
        held = x[:, :, : video.video_tokens].double()
        for slots in plan.slots.view(-1, plan.block_k).tolist():
            some = held[:, :, [t for t in slots if 0 <= t < video.video_tokens]]
            if some.shape[2]:
                want += some.var(2, correction=0).sum(-1) * some.shape[2]
        want /= held.var(2, correction=0).sum(-1) * video.video_tokens
        torch.testing.assert_close(purity.Purity(x, video).within((2, 4, 8)), want)

    @pytest.mark.parametrize("grid", [(33, 12, 12), (9, 6, 13), (1, 48, 64)], ids=str)
    def test_boxes_fit_and_pad_little(self, grid):
        video = VideoShape(*grid)
        found = purity.boxes(video, 64, torch.device("cpu"))
        assert len(set(found)) == len(found) >= 6
        for box in found:
            assert 64 <= math.prod(box) <= 128
            layout = Piecewise(tile=box).layout(video, torch.device("cpu"))
            assert len(found) == 6 or len(layout.slots.slots) <= 1.125 * video.tokens
        on_gpus = purity.boxes(video, 64, torch.device("cuda"))
        assert on_gpus
        assert all(math.prod(box) % 16 == 0 for box in on_gpus)

    def test_where_no_box_fits_the_tile_stays_open(self):
        assert purity.boxes(VideoShape(2, 3, 3), 64, torch.device("cpu")) == []
        _, handle, fit = self.calibrated(Piecewise(critical=0.3, block_q=512, block_k=512))
        assert handle.method.tile == "auto"
        assert str(fit) == "nothing was fitted: no box of as many tokens fits the grid"
