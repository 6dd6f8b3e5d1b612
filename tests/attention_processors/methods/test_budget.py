"""Budgets of key blocks: by row, by mass, by head, and blocks that are not alike."""

import pytest
import torch
from support.qkv import PLAIN, random_qkv

from gen_accel import Piecewise, SparseLinear, VideoShape

SMALL = {"block_q": 16, "block_k": 16}


class TestBudgets:
    def keep(self, video=PLAIN, **options):
        q, k, _ = random_qkv(video)
        options = {"tile": "raster", **SMALL, **options}
        plan = Piecewise(**options).plan_for(q, k, video=video)
        scores = 8**-0.5 * (q.unflatten(2, (-1, 16)).mean(3) @ k.unflatten(2, (-1, 16)).mean(3).mT)
        return plan, scores.softmax(-1)

    def test_mass_is_held_by_the_fewest(self):
        plan, shares = self.keep(budget="mass", mass=0.5, score="mean")
        for keep, share in zip(plan.keep.flatten(0, 2), shares.flatten(0, 2), strict=True):
            held = share[keep]
            assert held.sum() >= 0.5 > held.sum() - held.min()
            assert keep.sum() == 1 or held.min() >= share[~keep].max()

    def test_a_head_keeps_its_best_pairs_and_each_row_one(self):
        plan, shares = self.keep(budget="head", critical=0.3, score="mean")
        for keep, share in zip(plan.keep.flatten(0, 1), shares.flatten(0, 1), strict=True):
            best = torch.zeros_like(keep)
            best.flatten()[share.flatten().topk(int(0.3 * 64)).indices] = True
            best[range(8), share.argmax(1)] = True
            assert torch.equal(keep, best)
            assert keep.sum() <= plan.entries

    @pytest.mark.parametrize(
        "options", [{}, {"budget": "mass", "mass": 0.5}, {"budget": "head"}, {"score": "norm"}]
    )
    def test_where_each_block_holds_text_all_is_kept(self, options):
        """A video shorter than a block, in runs of tokens."""
        video = VideoShape(1, 2, 2, text=40)
        q, k, v = random_qkv(video)
        plan = Piecewise(tile="raster", **SMALL, **options).plan_for(q, k, v, video=video)
        assert plan.keep.all()

    @pytest.mark.parametrize("budget", [{"budget": "mass", "mass": 1.0}, {"critical": 1.0}])
    def test_all_is_all(self, budget):
        plan, _ = self.keep(**budget)
        assert plan.keep.all()

    def test_blocks_that_are_not_alike_are_kept_whole(self):
        video = VideoShape(4, 4, 8, text=5)
        q, k, _ = random_qkv(video)
        q[:, :, 16:32] = q[:, :, 16:17]  # the tokens of one block of queries, and of two of keys
        k[:, :, 32:48], k[:, :, 64:80] = k[:, :, 32:33], k[:, :, 64:65]
        method = Piecewise(critical=0.1, alike=0.5, tile="raster", **SMALL)
        keep = method.plan_for(q, k, video=video).keep
        assert keep[:, :, [0, *range(2, 9)]].all()
        assert keep[:, :, 1, [0, 1, 3, 5, 6, 7, 8]].all()
        assert (keep[:, :, 1, [2, 4]].sum(-1) == 1).all()

    def test_sparse_linear_takes_them_too(self):
        q, k, _ = random_qkv(PLAIN)
        options = {"budget": "head", "alike": 0.1, **SMALL}
        linear = SparseLinear(critical=0.2, **options).plan_for(q, k, video=PLAIN)
        piecewise = Piecewise(critical=0.2, score="mean", **options).plan_for(q, k, video=PLAIN)
        assert torch.equal(linear.keep, piecewise.keep)

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"budget": "mass"}, r"mass must be in \(0, 1\] for budget='mass', got None"),
            ({"budget": "mass", "mass": 1.5}, r"mass must be in \(0, 1\]"),
            ({"budget": "mass", "mass": 0.5, "critical": 0.3}, "takes mass, got critical=0.3"),
            ({"mass": 0.5}, "mass is for budget='mass', got budget='row'"),
            ({"budget": "all"}, "budget must be one of"),
            ({"alike": 1.0}, "alike must be None or less than 1, got 1.0"),
            ({"select": "threshold", "budget": "head"}, "budget is for select='topk'"),
            ({"select": "threshold", "alike": 0.3}, "alike is for select='topk'"),
        ],
        ids=str,
    )
    def test_refusals(self, options, why):
        with pytest.raises(ValueError, match=why):
            Piecewise(**options)

    def test_skipped_blocks_are_of_rows(self):
        with pytest.raises(ValueError, match="for budget='row', got 'head'"):
            SparseLinear(linear_over="marginal", budget="head")
