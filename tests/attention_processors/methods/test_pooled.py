"""The rest of block methods: what they leave out comes back, pooled."""

from dataclasses import replace

import pytest
import torch
from support.qkv import PLAIN, random_qkv

from gen_accel import BlockMixture, Neighborhood, Radial, SparseLinear, attention
from gen_accel.attention_processors.methods.blocks import smooth_qk

SMALL = {"block_q": 16, "block_k": 16}


def attended(method, q, k, v):
    return attention(q, k, v, video=PLAIN, method=method, kernel="reference")


class TestRestOfOthers:
    """What the other block methods leave out comes back."""

    @pytest.mark.parametrize(
        "method",
        [
            Radial(decay_factor=0.1, sink=False, block=16, rest="means"),
            Radial("paper", decay_factor=0.1, sink=False, block=16, rest="means", centre="key"),
            Neighborhood((1, 2, 2), rest="means"),
            SparseLinear(critical=0.2, rest="means", **SMALL),
            BlockMixture(
                partition="3d",
                chunk_3d=(2, 2, 4),
                select="topk",
                scope="query_head",
                topk=(2, 2, 2),
                routing="block",
                rest="means",
            ),
        ],
        ids=lambda method: f"{type(method).__name__} {method.centre}",
    )
    def test_with_equal_keys_it_is_dense(self, method):
        """Of equal keys every block weighs what it should, and of equal values comes out right."""
        q, k, v = random_qkv(PLAIN, dtype=torch.float64)
        k, v = k[:, :, :1].expand_as(k), v.mean(2, keepdim=True) + torch.zeros_like(v)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(attended(method, q, k, v), want)

    @pytest.mark.parametrize(
        "method",
        [
            Radial(decay_factor=0.1, sink=False, block=16),
            Neighborhood((1, 2, 2)),
            SparseLinear(critical=0.2, **SMALL),
        ],
        ids=lambda method: type(method).__name__,
    )
    def test_it_errs_less_on_smooth_inputs(self, method):
        q, k = (x.double() for x in smooth_qk(PLAIN, 16))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        found = [replace(method, rest=rest) for rest in (None, "means")]
        errors = [(attended(one, q, k, k) - want).norm() for one in found]
        assert errors[1] < errors[0] / 2

    def test_a_window_keeps_its_blocks_whole(self):
        dropped, pooled = (Neighborhood((1, 2, 2), rest=rest) for rest in (None, "means"))
        assert pooled.plan(PLAIN).partial is None
        assert torch.equal(pooled.plan(PLAIN).keep, dropped.plan(PLAIN).keep)
        assert dropped.density(PLAIN) < pooled.density(PLAIN) < 1

    @pytest.mark.parametrize(
        ("kind", "options", "why"),
        [
            (BlockMixture, {"rest": "means"}, "rest='means' is for routing='block'"),
            (BlockMixture, {"rest": "means", "routing": "token"}, "got routing='token'"),
            (Neighborhood, {"rest": "means", "is_causal": (True, False, False)}, "later tokens"),
            (Radial, {"centre": "key"}, "centre and order are for rest='means'"),
            (
                SparseLinear,
                {"rest": "mean"},
                "rest of SparseLinear must be one of means or none, got 'mean'",
            ),
        ],
    )
    def test_what_cannot_be_pooled_is_refused(self, kind, options, why):
        with pytest.raises(ValueError, match=why):
            kind(**options)
