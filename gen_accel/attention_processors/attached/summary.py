"""What an attachment did: for each layer and step, which attention ran, and what it cost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gen_accel.kernels import Choice
from gen_accel.plan import Plan


@dataclass
class Record:
    """One layer at one step: all its calls, two with guidance.

    FLOPs count both products of attention, at 2 for each multiply and add; what chooses the
    blocks, and the linear branch of sparse-linear attention, are not counted.
    """

    why_dense: str | None = None
    choice: Choice | None = None
    tokens: int = 0
    calls: int = 0
    dense_flops: float = 0.0
    seconds: float | None = None
    # Sums over the calls. What q and k decided stays on its device until someone asks.
    kept: Tensor | float = 0.0
    computed: Tensor | float = 0.0

    def add(
        self,
        shape: Sequence[int],
        *,
        why: str | None = None,
        choice: Choice | None = None,
        plans: Sequence[Plan] = (),
    ) -> None:
        """Count one call.

        Args:
            shape: (B, N, H, D).
            plans: that made it up, each over all N tokens or a part of them; none where the
                model's own attention ran.
        """
        B, N, H, D = shape
        dense = 4.0 * B * H * N * N * D
        self.why_dense, self.choice, self.tokens = why, choice, N
        self.calls += 1
        self.dense_flops += dense
        kept: Tensor | float = 0.0 if plans else 1.0
        computed: Tensor | float = kept
        for plan in plans:
            densities = plan.densities() if plan.dynamic else (plan.density, plan.computed_density)
            part = (plan.tokens / N) ** 2
            kept, computed = kept + part * densities[0], computed + part * densities[1]
        self.kept = self.kept + kept
        self.computed = self.computed + computed * dense

    @property
    def density(self) -> float:
        """Mean over the calls."""
        return float(self.kept) / self.calls

    @property
    def flops(self) -> float:
        return float(self.computed)


@dataclass(frozen=True)
class Summary:
    """Printable; `to_dict()` for a report."""

    method: Any
    schedule: Any
    records: dict[tuple[str, int], Record] = field(repr=False)

    @property
    def density(self) -> float | None:
        """Mean over the sparse calls; None when none ran."""
        sparse = [record for record in self.records.values() if record.why_dense is None]
        calls = sum(record.calls for record in sparse)
        return sum(r.density * r.calls for r in sparse) / calls if calls else None

    @property
    def flops_share(self) -> float | None:
        """Executed attention FLOPs over those of dense attention, in all layers and steps."""
        dense = sum(record.dense_flops for record in self.records.values())
        return sum(record.flops for record in self.records.values()) / dense if dense else None

    @property
    def seconds(self) -> float | None:
        """Spent in attention; None unless timed."""
        known = [r.seconds for r in self.records.values() if r.seconds is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        chosen = {str(r.choice) for r in self.records.values() if r.choice is not None}
        return {
            "method": str(self.method),
            "schedule": str(self.schedule),
            "kernels": sorted(chosen),
            "tokens": max((record.tokens for record in self.records.values()), default=0),
            "density": self.density,
            "sparsity": None if self.density is None else 1 - self.density,
            "attention_flops": sum(record.flops for record in self.records.values()),
            "attention_flops_share": self.flops_share,
            "attention_seconds": self.seconds,
            "layers": {
                layer: {"steps": self._steps(layer), **self._totals(layer)}
                for layer in dict.fromkeys(layer for layer, _ in self.records)
            },
        }

    def _steps(self, layer: str) -> dict[int, str]:
        return {
            step: f"dense ({record.why_dense})" if record.why_dense else "sparse"
            for (name, step), record in sorted(self.records.items())
            if name == layer
        }

    def _totals(self, layer: str) -> dict[str, Any]:
        records = [record for (name, _), record in self.records.items() if name == layer]
        seconds = [record.seconds for record in records if record.seconds is not None]
        return {
            "density": min(record.density for record in records),
            "flops_share": sum(r.flops for r in records) / sum(r.dense_flops for r in records),
            "seconds": sum(seconds) if seconds else None,
        }

    def __str__(self) -> str:
        head = f"{self.method}\n{self.schedule}"
        if not self.records:
            return f"{head}\nnothing ran yet (calls inside a compiled graph are not counted)"
        data = self.to_dict()
        lines = [head, f"kernel: {', '.join(data['kernels']) or 'none, all dense'}"]
        if self.density is not None:
            lines.append(
                f"{data['tokens']} tokens, density {self.density:.3f} "
                f"(sparsity {1 - self.density:.3f}) where sparse"
            )
        share = data["attention_flops_share"]
        lines.append(
            f"attention FLOPs executed: {data['attention_flops']:.3g}, {share:.3f} of dense"
        )
        if self.seconds is not None:
            lines.append(f"attention took {self.seconds:.2f} s")
        for layer, row in data["layers"].items():
            kinds = Counter(row["steps"].values())
            counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            timed = "" if row["seconds"] is None else f"  {row['seconds']:.2f} s"
            lines.append(f"  {layer:<28} {counts}  FLOPs {row['flops_share']:.3f}{timed}")
        return "\n".join(lines)
