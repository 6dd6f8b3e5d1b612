"""Records of an attachment: what ran in each layer and step, at which cost and error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.kernels import Choice
from gen_accel.plan import Plan, Route

# By a layer's name, and the step from 0.
Key = tuple[str, int]

ROWS = 64  # queries of each head that a watch computes exactly


@dataclass
class Record:
    """One layer at one step: all its calls, two with guidance.

    FLOPs count both products of attention, at 2 for each multiply and add; the choice of blocks,
    and the linear branch of sparse-linear attention, are not counted.

    Attributes:
        why_dense: reason; None if a method ran.
        choice: the kernel; None if none ran.
        by_itself: calls in which the method computed without a kernel. They count as dense, as it
            is not known which pairs were left out.
        learned: calls that a method with a memory learned from; they are dense.
        in_graph: it ran dense in a graph, which leaves no record. Its figures are inferred from
            other records.
        device: of the plans that ran; None if none did.
    """

    why_dense: str | None = None
    choice: Choice | None = None
    tokens: int = 0
    calls: int = 0
    by_itself: int = 0
    learned: int = 0
    in_graph: bool = False
    dense_flops: float = 0.0
    seconds: float | None = None
    device: torch.device | None = None
    # Sums over the calls. Sums that depend on q and k stay on their device until they are read.
    _kept: float = 0.0
    _flops: float = 0.0
    _tallies: dict[tuple, "Tally"] = field(default_factory=dict, repr=False)

    def add(
        self,
        shape: Sequence[int],
        *,
        why: str | None = None,
        choice: Choice | None = None,
        plans: Sequence[tuple[Plan, int]] = (),
    ) -> None:
        """Count one call.

        Args:
            shape: (B, N, H, D).
            plans: that made it up, each over all N tokens or a part of them, with the number of
                heads it was for; none if the model's own attention ran, or a method by itself.
        """
        B, N, H, D = shape
        dense = 4.0 * B * H * N * N * D
        self.why_dense, self.choice, self.tokens = why, choice, N
        self.calls += 1
        self.dense_flops += dense
        if not plans:
            self.by_itself += why is None
            self._kept, self._flops = self._kept + 1.0, self._flops + dense
        for plan, heads in plans:
            self.device = plan.slots.device
            part = (plan.tokens / N) ** 2 * heads / H
            if plan.dynamic:
                picks = plan.partial.picks.shape if isinstance(plan.partial, Route) else ()
                facts = plan.tokens, plan.patterns, plan.block_q, plan.block_k, self.device
                key = (*facts, picks, part, dense)
                if key not in self._tallies:
                    self._tallies[key] = Tally(plan, part, dense)
                self._tallies[key].add(plan)
            else:
                self._kept += part * plan.density
                self._flops += part * plan.computed_density * dense

    def as_dense(self, why: str) -> "Record":
        """Return the record of the same calls, had they run dense in a graph."""
        made = Record(why, tokens=self.tokens, calls=self.calls, in_graph=True)
        made.dense_flops = made._flops = self.dense_flops
        made._kept = float(self.calls)
        return made

    def settle(self) -> None:
        """Add the counts that lie on the device. Waits for it."""
        while self._tallies:
            _, tally = self._tallies.popitem()
            kept, computed = tally.shares()
            self._kept, self._flops = self._kept + kept, self._flops + computed * tally.dense

    @property
    def told(self) -> str:
        return f"dense ({self.why_dense})" if self.why_dense else "sparse"

    @property
    def density(self) -> float:
        """Mean over the calls."""
        self.settle()
        return self._kept / self.calls

    @property
    def flops(self) -> float:
        self.settle()
        return self._flops


class Tally:
    """Counts of the pairs that plans of one layout keep, at two device operations for each plan.

    Counts are exact without a route. With one, plans after the first count either the groups that
    queries picked or the kept blocks, in turns; all are taken to hold the mean number of tokens.

    Args:
        plan: one of the layout.
        part: share of the N x N pairs of a call that a plan is over.
        dense: FLOPs of a call as dense attention.
    """

    def __init__(self, plan: Plan, part: float = 1.0, dense: float = 1.0) -> None:
        self.part, self.dense, self.tokens = part, dense, plan.tokens
        self._patterns = plan.patterns[0] * plan.patterns[1]
        self._pair = plan.block_q * plan.block_k / plan.tokens**2
        self._groups = plan.partial.picks.numel() if isinstance(plan.partial, Route) else 0
        self._plans = self._plans_seen = self._plans_picked = 0
        # (Kq, 2) fp32, tokens and slots in the key blocks that a query block sees, over all
        # patterns and plans; with a route (), blocks.
        self._seen: Tensor | None = None
        self._picked: Tensor | None = None  # (), groups
        self._held: Tensor | None = None  # (Kq, 2), tokens and slots in each query block
        self._before: Tensor | float = 0.0  # (2,), pairs of earlier grids of as many tokens

    @torch.no_grad()
    def add(self, plan: Plan) -> None:
        self._plans += 1
        if isinstance(plan.partial, Route):
            keep, picks = plan.keep, plan.partial.picks
            if self._seen is None or self._picked is None:
                self._seen, self._picked = keep.sum(), picks.sum()
                self._plans_seen = self._plans_picked = 1
            elif self._plans % 2:
                self._picked = self._picked + picks.sum()
                self._plans_picked += 1
            else:
                self._seen = self._seen + keep.sum()
                self._plans_seen += 1
            return
        rows, columns = plan.held
        if self._held is not None and self._held is not rows:
            self._before, self._seen = self._pairs(), None
        with torch.autocast(plan.keep.device.type, enabled=False):
            blocks = plan.keep.sum((0, 1), dtype=torch.float32)
            seen = self._seen
            self._seen = blocks @ columns if seen is None else torch.addmm(seen, blocks, columns)
        self._held = rows

    def _pairs(self) -> Tensor:
        """(2,) fp64: kept, and computed for them."""
        assert self._seen is not None
        assert self._held is not None
        return self._before + (self._held.to(self._seen) * self._seen).double().sum(0)

    def shares(self) -> tuple[float, float]:
        """Shares of the N x N pairs of a call, kept and computed, summed over the plans."""
        if self._picked is None or self._seen is None:
            kept, computed = self._pairs().tolist()
            scale = self.part / self._patterns / self.tokens**2
            return kept * scale, computed * scale
        blocks = int(self._seen) / self._plans_seen / self._patterns
        computed = min(1.0, blocks * self._pair)
        kept = int(self._picked) / self._plans_picked / self._groups
        scale = self.part * self._plans
        return min(kept, computed) * scale, computed * scale


@dataclass(frozen=True)
class WatchedErrors:
    """Errors of the sparse calls of a generation, on some rows each. Printable.

    Args:
        calls: relative L2 error of all heads, by the name of a layer and the step.
    """

    calls: Mapping[Key, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.calls.values()) / len(self.calls)

    def to_dict(self) -> dict[str, object]:
        if not self.calls:
            return {}
        layer, step = max(self.calls, key=lambda key: self.calls[key])
        return {
            "mean_error": self.mean,
            "largest_error": self.calls[layer, step],
            "largest_at": {"layer": layer, "step": step},
        }

    def __str__(self) -> str:
        if not self.calls:
            return "watch: no sparse call was seen"
        layer, step = max(self.calls, key=lambda key: self.calls[key])
        return (
            f"watch: attention error {self.mean:.3f} on average, at most "
            f"{self.calls[layer, step]:.3f} ({layer} at step {step})"
        )


class Watch:
    """Computes some rows of the first call of each layer and step exactly, and compares them."""

    def __init__(self) -> None:
        # Mean squares of the error and of the exact rows, (2,), on the call's device.
        self._seen: dict[Key, Tensor] = {}

    def forget(self) -> None:
        """Drop the errors of earlier generations."""
        self._seen = {}

    @torch.no_grad()
    def look(
        self,
        name: str,
        number: int,
        step: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        *,
        scale: float,
    ) -> None:
        """Compare some rows of the last sample of a layer, by its name and number.

        Args:
            q, k, v, out: (B, H, N, D).
        """
        if (name, step) in self._seen:
            return
        g = torch.Generator().manual_seed(step * 10_007 + number)
        rows = torch.randint(q.shape[2], (min(ROWS, q.shape[2]),), generator=g).to(q.device)
        exact = F.scaled_dot_product_attention(q[-1:, :, rows], k[-1:], v[-1:], scale=scale)
        errors = out[-1:, :, rows] - exact
        squares = [x.float().square().mean() for x in (errors, exact)]
        self._seen[name, step] = torch.stack(squares)

    def errors(self) -> WatchedErrors:
        """Return the errors of the last generation. Waits for the device."""
        found = {key: squares.double().tolist() for key, squares in self._seen.items()}
        calls = {key: (error / max(all_, 1e-30)) ** 0.5 for key, (error, all_) in found.items()}
        return WatchedErrors(calls)
