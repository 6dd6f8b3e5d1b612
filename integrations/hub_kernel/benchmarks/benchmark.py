"""`kernels benchmark OWNER/block-sparse-rest --version 1`: kept blocks and a pooled rest."""

# pyright: reportMissingImports=false

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class BlockSparseRestBenchmark(Benchmark):
    """A fifth of the blocks, at the sizes of video models, beside torch's own attention."""

    seed = 0

    def _draw(self, heads: int, tokens: int, dim: int) -> None:
        shape = (1, heads, tokens, dim)
        self.q, self.k, self.v = (
            torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3)
        )
        blocks = -(-tokens // 64)
        self.keep = torch.rand(1, heads, blocks, blocks, device=self.device) < 0.2
        self.every = torch.ones_like(self.keep)
        self.out = torch.empty_like(self.q)

    def setup_wan_480p(self) -> None:
        """Wan 2.1 1.3B, 81 frames of 480p."""
        self._draw(12, 32760, 128)

    def benchmark_wan_480p(self) -> None:
        self.out = self.kernel.block_sparse_attention(self.q, self.k, self.v, self.keep)[0]

    def setup_odd(self) -> None:
        """A head dim and a number of tokens that nothing divides."""
        self._draw(8, 4999, 96)

    def benchmark_odd(self) -> None:
        self.out = self.kernel.block_sparse_attention(self.q, self.k, self.v, self.every)[0]

    def verify_odd(self) -> torch.Tensor:
        """All blocks kept is torch's attention."""
        return F.scaled_dot_product_attention(self.q, self.k, self.v)
