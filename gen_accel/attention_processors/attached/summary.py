"""Records of an attachment: what ran in each layer and step, at which cost and error."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.kernels import Choice
from gen_accel.method import Method
from gen_accel.plan import Plan, Route

# By a layer's name, and the step from 0.
Key = tuple[str, int]

BY_ITSELF = "its own code, without a kernel"
ROWS = 64  # queries of each head that a watch computes exactly


@dataclass
class Record:
    """One layer at one step: all its calls, two with guidance.

    FLOPs count both products of attention, at 2 for each multiply and add; the choice of blocks,
    and the linear branch of sparse-linear attention, are not counted.

    Attributes:
        why_dense: None where a method ran.
        choice: the kernel; None where none ran.
        by_itself: calls in which the method computed without a kernel. They count as dense, as it
            is not known which pairs were left out.
        learned: calls that a method with a memory learned from; they are dense.
        in_graph: it ran dense in a graph, which leaves no record. Its figures are inferred from
            other records.
        device: where a plan ran; None where none did.
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
    _tallies: dict["Layout", "Tally"] = field(default_factory=dict, repr=False)

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
                heads it was for; none where the model's own attention ran, or a method by itself.
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
                layout = Layout.of(plan, part, dense)
                self._tallies.setdefault(layout, Tally(layout)).add(plan)
            else:
                self._kept += part * plan.density
                self._flops += part * plan.computed_density * dense

    def settle(self) -> None:
        """Add the counts that lie on the device. Waits for it."""
        while self._tallies:
            layout, tally = self._tallies.popitem()
            kept, computed = tally.shares()
            self._kept, self._flops = self._kept + kept, self._flops + computed * layout.dense

    def as_dense(self, why: str) -> "Record":
        """Return the record of the same calls, had they run dense."""
        return Record(
            why,
            tokens=self.tokens,
            calls=self.calls,
            in_graph=True,
            dense_flops=self.dense_flops,
            _kept=float(self.calls),
            _flops=self.dense_flops,
        )

    @property
    def density(self) -> float:
        """Mean over the calls."""
        self.settle()
        return self._kept / self.calls

    @property
    def flops(self) -> float:
        self.settle()
        return self._flops


@dataclass(frozen=True)
class Layout:
    """Facts that plans made call by call have in common, without their patterns.

    Args:
        tokens: of the plan.
        patterns: samples times heads that the plan tells apart.
        routed: slots, groups and patterns of a route; None without one.
        part: share of the N x N pairs of a call that the plan is over.
        dense: FLOPs of a call as dense attention.
        device: of its tensors.
    """

    tokens: int
    patterns: int
    block_q: int
    block_k: int
    routed: tuple[int, int, int] | None
    part: float
    dense: float
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, part: float, dense: float) -> "Layout":
        patterns = plan.patterns[0] * plan.patterns[1]
        routed = None
        if isinstance(plan.partial, Route):
            B, H, S, C = plan.partial.picks.shape
            routed = (S, C, B * H)
        blocks = plan.block_q, plan.block_k
        return cls(plan.tokens, patterns, *blocks, routed, part, dense, plan.slots.device)


class Tally:
    """Counts of the pairs that plans of one layout keep, at two device operations for each plan.

    Counts are exact without a route. With one, plans after the first count either the groups that
    queries picked or the kept blocks, in turns; all are taken to hold the mean number of tokens.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._plans = self._plans_seen = self._plans_picked = 0
        # (Kq, 2) fp32, tokens and slots in the key blocks that a query block sees, over all
        # patterns and plans; with a route (), blocks.
        self._seen: Any = None
        self._picked: Any = None  # (), groups
        self._held: Any = None  # (Kq, 2), tokens and slots in each query block
        self._before: Any = 0.0  # (2,), pairs of grids of as many tokens that came before

    @torch.no_grad()
    def add(self, plan: Plan) -> None:
        self._plans += 1
        if isinstance(plan.partial, Route):
            self._add_route(plan.keep, plan.partial.picks)
            return
        rows, columns = plan.held
        if self._held is not None and self._held is not rows:
            self._before, self._seen = self._pairs(), None
        with torch.autocast(plan.keep.device.type, enabled=False):
            blocks = plan.keep.sum((0, 1), dtype=torch.float32)
            first = self._seen is None
            self._seen = blocks @ columns if first else torch.addmm(self._seen, blocks, columns)
        self._held = rows

    def _pairs(self) -> Tensor:
        """(2,) fp64: kept, and computed for them."""
        return self._before + (self._held.to(self._seen) * self._seen).double().sum(0)

    def _add_route(self, keep: Tensor, picks: Tensor) -> None:
        if self._seen is None:
            self._seen, self._picked = keep.sum(), picks.sum()
            self._plans_seen = self._plans_picked = 1
        elif self._plans % 2:
            self._picked = self._picked + picks.sum()
            self._plans_picked += 1
        else:
            self._seen = self._seen + keep.sum()
            self._plans_seen += 1

    def shares(self) -> tuple[float, float]:
        """Shares of the N x N pairs of a call, kept and computed, summed over the plans."""
        layout = self._layout
        if layout.routed is None:
            kept, computed = self._pairs().tolist()
            scale = layout.part / layout.patterns / layout.tokens**2
            return kept * scale, computed * scale
        slots, groups, patterns = layout.routed
        pair = layout.block_q * layout.block_k / layout.tokens**2
        blocks = int(self._seen) / self._plans_seen / layout.patterns
        computed = min(1.0, blocks * pair)
        kept = int(self._picked) / self._plans_picked / (slots * groups * patterns)
        scale = layout.part * self._plans
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

    def to_dict(self) -> dict[str, Any]:
        if not self.calls:
            return {}
        layer, step = max(self.calls, key=lambda key: self.calls[key])
        where = {"layer": layer, "step": step}
        largest = self.calls[layer, step]
        return {"mean_error": self.mean, "largest_error": largest, "largest_at": where}

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


@dataclass(frozen=True)
class UnrecordedLayers:
    """Layers and passes that left no record.

    Args:
        displaced: layers whose processors were exchanged, to the class of the new processor.
        layers: how many there are.
        passes: forward passes that ran.
        paused: forward passes inside `paused()`.
        one_graph: the whole model is one graph of torch.compile, in which steps cannot be told
            apart.
        in_graphs: blocks are graphs, in which the model's own attention leaves no record.
    """

    displaced: Mapping[str, str] = field(default_factory=dict)
    layers: int = 0
    passes: int = 0
    paused: int = 0
    one_graph: bool = False
    in_graphs: bool = False
    recording: bool = True

    def why_empty(self) -> str:
        """Say why nothing at all was recorded."""
        if not self.recording:
            return "nothing was recorded, as record=False says"
        if self.displaced:
            all_of = "all" if len(self.displaced) == self.layers else f"{len(self.displaced)} of"
            return (
                f"nothing of ours ran: {all_of} {self.layers} attentions have other processors "
                f"than those of attach, such as {next(iter(self.displaced.values()))}; detach() "
                "and attach again"
            )
        if self.one_graph:
            return "nothing was recorded: the model is one graph, which tells no step apart"
        if self.paused and not self.passes:
            return f"nothing was recorded: all {self.paused} forward passes ran inside paused()"
        if self.in_graphs and self.passes:
            return (
                "nothing was recorded: all attention ran dense, in graphs of torch.compile, where "
                "the model's own leaves no record"
            )
        return "nothing ran yet"


@dataclass(frozen=True)
class Summary:
    """Summary of a generation. Printable; `to_dict()` for a report, `explain()` for one step.

    Args:
        layers: all that the method was attached to, by name, and why each is dense at all steps.
        steps: each step to why all layers are dense there.
        passes: forward passes of the transformers in each step.
        watching: errors of some rows of the sparse calls; None without a watch.
    """

    method: Method
    schedule: Schedule
    records: dict[Key, Record] = field(repr=False)
    layers: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    steps: Mapping[int, str | None] = field(default_factory=dict, repr=False)
    passes: Mapping[int, int] = field(default_factory=dict, repr=False)
    silence: UnrecordedLayers = field(default_factory=UnrecordedLayers, repr=False)
    watching: WatchedErrors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Add records of dense calls in graphs, which leave none, by the sizes of the others."""
        object.__setattr__(self, "records", dict(self.records))
        if not self.silence.in_graphs or self.silence.one_graph:
            return
        for name, why in self.layers.items():
            for step in {*self.steps, *(step for _, step in self.records)}:
                reason = why or self.steps.get(step)
                like = self._like(name, step) if reason is not None else None
                if like is not None and (name, step) not in self.records:
                    self.records[name, step] = like.as_dense(str(reason))

    def _like(self, layer: str, step: int) -> Record | None:
        """Return a record of the same layer, or of the same step, or any."""
        found = {key: record for key, record in self.records.items() if record.why_dense is None}
        near = [record for (name, _), record in found.items() if name == layer]
        near += [record for (_, at), record in found.items() if at == step]
        return next(iter([*near, *found.values()]), None)

    @property
    def density(self) -> float | None:
        """Mean over the sparse calls; None when none ran."""
        sparse = [record for record in self.records.values() if record.why_dense is None]
        calls = sum(record.calls for record in sparse)
        return sum(r.density * r.calls for r in sparse) / calls if calls else None

    @property
    def flops_share(self) -> float | None:
        """Executed attention FLOPs over dense attention's, in all layers and steps."""
        dense = sum(record.dense_flops for record in self.records.values())
        return sum(record.flops for record in self.records.values()) / dense if dense else None

    @property
    def seconds(self) -> float | None:
        """Seconds spent in attention; None unless timed."""
        known = [r.seconds for r in self.records.values() if r.seconds is not None]
        return sum(known) if known else None

    @property
    def learned(self) -> list[int]:
        """The steps at which a method with a memory learned."""
        return sorted({step for (_, step), record in self.records.items() if record.learned})

    @property
    def reused(self) -> list[int]:
        """The steps at which a method ran by its memory."""
        sparse = {step for (_, step), r in self.records.items() if r.why_dense is None}
        return sorted(sparse) if self.method.keeps_state else []

    @property
    def kernels(self) -> list[str]:
        """The kernels that ran, by name."""
        chosen = {r.choice.kernel for r in self.records.values() if r.choice is not None}
        own = any(r.by_itself for r in self.records.values())
        return sorted(chosen) + ([BY_ITSELF] if own else [])

    def to_dict(self) -> dict[str, Any]:
        chosen = {str(r.choice) for r in self.records.values() if r.choice is not None}
        return {
            "verdict": self.verdict(),
            "method": repr(self.method),
            "schedule": str(self.schedule),
            "kernels": sorted(chosen),
            "tokens": max((record.tokens for record in self.records.values()), default=0),
            "density": self.density,
            "sparsity": None if self.density is None else 1 - self.density,
            "attention_flops": sum(record.flops for record in self.records.values()),
            "attention_flops_share": self.flops_share,
            "attention_seconds": self.seconds,
            **self._remembered(),
            **({} if self.watching is None else {"watch": self.watching.to_dict()}),
            "layers": {
                layer: {"steps": self._steps(layer), **self._totals(layer)}
                for layer in dict.fromkeys(layer for layer, _ in self.records)
            },
        }

    def verdict(self) -> str:
        """One line: how much less work attention was, where, and by what."""
        share, density = self.flops_share, self.density
        if share is None:
            return self.silence.why_empty()
        sparse = [key for key, record in self.records.items() if record.why_dense is None]
        if density is None or not sparse:
            reasons = dict.fromkeys(str(r.why_dense) for r in self.records.values())
            by = f", kernel {' and '.join(self.kernels)}" if self.kernels else ""
            return f"attention ran dense throughout: {', '.join(reasons)}{by}"
        if density > 1 - 1e-9 and BY_ITSELF not in self.kernels:
            return f"nothing is left out at this size: density 1, kernel {self._by()}"
        names = list(self.layers) or list(dict.fromkeys(name for name, _ in self.records))
        where = f"{len({name for name, _ in sparse})} of {len(names)} layers sparse"
        less = f"{1 / share:.1f}x less work" if share < 0.95 else f"{share:.2f} of dense attention"
        known = "" if self.kernels == [BY_ITSELF] else f", density {density:.2f}"
        return f"attention {less}: {where} {self._when(sparse)}{known}, kernel {self._by()}"

    def explain(self, step: int | None = None, layer: str | int | None = None) -> str:
        """Explain which attention ran and why: at one step, in one layer, or both.

        Args:
            step: from 0. Without: each that ran.
            layer: its name, the end of it, or the number of its block. Without: all.

        Raises:
            ValueError: no layer is called that.
        """
        names = self._named(layer)
        ran = sorted({*self.steps, *(step for _, step in self.records)})
        if step is not None:
            return "\n".join(self._at(step, names, ran))
        if not ran:
            return self.verdict()
        return "\n".join(line for one in ran for line in self._at(one, names, ran))

    def __str__(self) -> str:
        if not self.records:
            return f"{self.verdict()}\n{self.method}\n{self.schedule}"
        data = self.to_dict()
        lines = [data["verdict"], str(self.method), str(self.schedule)]
        own = [BY_ITSELF] if BY_ITSELF in self.kernels else []
        lines.append(f"kernel: {', '.join(data['kernels'] + own) or 'none, all dense'}")
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
        if self.method.keeps_state:
            made, used = (
                f"{len(steps)} steps ({spans(steps)})" if steps else "no step"
                for steps in (self.learned, self.reused)
            )
            lines.append(f"learned at {made}, reused at {used}")
        if self.watching is not None:
            lines.append(str(self.watching))
        lines += self._groups()
        if self.silence.displaced:
            lines.append(
                f"  {len(self.silence.displaced)} layers have other processors, and run "
                f"dense: {', '.join(self.silence.displaced)}"
            )
        return "\n".join(lines)

    def _remembered(self) -> dict[str, list[int]]:
        if not self.method.keeps_state:
            return {}
        return {"learned_steps": self.learned, "reused_steps": self.reused}

    def _by(self) -> str:
        """Kernels of the sparse calls."""
        sparse = {key: one for key, one in self.records.items() if one.why_dense is None}
        return " and ".join(replace(self, records=sparse).kernels)

    def _when(self, sparse: Sequence[Key]) -> str:
        steps = sorted({step for _, step in sparse})
        ran = sorted({step for _, step in self.records})
        if steps == ran:
            return "at every step" if len(ran) > 1 else f"at step {ran[0]}"
        if steps == [step for step in ran if step >= steps[0]]:
            return f"from step {steps[0]}"
        return f"at steps {spans(steps)}"

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

    def _groups(self) -> Iterator[str]:
        """A line for each group of layers that did the same at the same steps."""
        groups: dict[tuple, list[str]] = {}
        for name in dict.fromkeys(name for name, _ in self.records):
            steps = self._steps(name)
            density = round(self._totals(name)["density"], 2)
            groups.setdefault((tuple(steps.items()), density), []).append(name)
        for (steps, _), names in groups.items():
            kinds: dict[str, list[int]] = {}
            for step, kind in steps:
                kinds.setdefault(kind, []).append(step)
            what = "; ".join(
                f"{len(at)} x {kind}, step{'s' if len(at) > 1 else ''} {spans(at)}"
                for kind, at in kinds.items()
            )
            totals = [self._totals(name) for name in names]
            share = sum(total["flops_share"] for total in totals) / len(totals)
            seconds = [total["seconds"] for total in totals if total["seconds"] is not None]
            timed = f"  {sum(seconds):.2f} s" if seconds else ""
            yield f"  {called(names)}: {what}  FLOPs {share:.3f}{timed}"

    def _named(self, layer: str | int | None) -> list[str]:
        names = list(self.layers) or list(dict.fromkeys(name for name, _ in self.records))
        if layer is None:
            return names
        end = f".{layer}"
        found = [name for name in names if name == layer or name.endswith(end)]
        if not found:
            raise ValueError(f"layer must be one of {', '.join(names)}, got {layer!r}")
        return found

    def _at(self, step: int, names: Sequence[str], ran: Sequence[int]) -> Iterator[str]:
        """Describe a step, with layers that did the same put together."""
        if not ran:
            yield f"step {step}: {self.silence.why_empty()}"
            return
        if step not in ran:
            paused = f", and {self.silence.paused} passes inside paused()"
            also = paused if self.silence.paused else ""
            yield f"step {step} did not run: the last generation had steps {spans(ran)}{also}"
            return
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._why(name, step), []).append(name)
        for why, some in groups.items():
            yield f"step {step}, {called(some)}: {why}"

    def _why(self, layer: str, step: int) -> str:
        record = self.records.get((layer, step))
        if record is not None and record.why_dense is not None:
            where = ", in a graph of torch.compile" if record.in_graph else ""
            what = ", and learned from" if record.learned else ""
            by = "" if record.choice is None else f", by {record.choice}"
            return f"dense ({record.why_dense}){what}{by}{where}"
        if record is not None and record.by_itself:
            return f"{type(self.method).__name__} by {BY_ITSELF}: what it leaves out is not known"
        if record is not None:
            if record.density > 1 - 1e-9:
                return f"sparse by name: nothing is left out at this size, by {record.choice}"
            return f"sparse, density {record.density:.3f}, by {record.choice}"
        there = self.silence.displaced.get(layer)
        if there is not None:
            return f"dense: a {there} has taken the place of attach's processor; attach again"
        if not self.silence.recording:
            return self.silence.why_empty()
        if self.silence.one_graph:
            return "not recorded: the model is one graph, which tells no step apart"
        dense = self.layers.get(layer) or self.steps.get(step)
        if self.silence.in_graphs and dense is not None:
            return f"dense ({dense}), in a graph of torch.compile"
        part = layer.partition(".")[0]
        beside = any(at == step and name.startswith(f"{part}.") for name, at in self.records)
        if beside or (
            self.passes.get(step) and len({n.partition(".")[0] for n in self.layers}) == 1
        ):
            return "not called, though its model ran: a cache or a hook skipped this block"
        return "not called: its model did not run at this step"


def spans(numbers: Sequence[int]) -> str:
    """Write rising numbers with runs drawn together: "0-9, 12"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def called(names: Sequence[str]) -> str:
    """Names of layers, with numbers of blocks drawn together: "transformer.blocks.0-29"."""
    groups: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        at = next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None)
        if at is None:
            plain.append(name)
            continue
        parts = name.split(".")
        groups.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append(
            int(parts[at])
        )
    drawn = [
        ".".join(filter(None, (before, spans(sorted(set(numbers))), after)))
        for (before, after), numbers in groups.items()
    ]
    return ", ".join(plain + drawn)
