"""The methods with blocks so small that they leave something out on the tests' few tokens."""

from gen_accel import BlockMixture, Neighborhood, Radial, SparseLinear

# On so few frames the default keeps every block.
RADIAL = Radial(decay_factor=0.2)
WINDOW = Neighborhood(window=(-1, 3, 4))
MIXTURE = BlockMixture(
    chunks=(3, 4, 6), select="topk", scope="query_head", topk=(1, 2, 2), block=16
)
LINEAR = SparseLinear(critical=0.2, block_q=16, block_k=16)
