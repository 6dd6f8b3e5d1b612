"""Records of an attachment, and their summary: what ran in each layer and step, at which cost and
error, and why."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.kernels import Choice
from gen_accel.method import Method
from gen_accel.parsing import brief, shown
from gen_accel.plan import Plan, Route
from gen_accel.registry import too_small

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
        why_dense: reason; None if a method ran.
        choice: the kernel; None if none ran.
        by_itself: calls in which the method computed without a kernel, which count as dense.
        learned: dense calls that a method with a memory learned from.
        in_graph: it ran dense in a graph, and its figures are inferred from other records.
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
        keys: int | None = None,
        asked: float = 1.0,
    ) -> None:
        """Count one call of shape (B, N, H, D).

        Args:
            asked: share of the queries in the blocks of the plans that the model asked for.
            keys: number that a dense call would have seen; None: N.
            plans: that made it up, each over all N tokens or a part of them, with the heads it was
                for; none if the model's own attention ran, or a method by itself.
        """
        B, N, H, D = shape
        pairs = N * (keys or N)
        dense = 4.0 * B * H * pairs * D
        self.why_dense, self.choice, self.tokens = why, choice, N
        self.calls += 1
        self.dense_flops += dense
        if not plans:
            self.by_itself += why is None
            self._kept, self._flops = self._kept + 1.0, self._flops + dense
        for plan, heads in plans:
            self.device = plan.slots.device
            part = plan.tokens**2 / pairs * heads / H
            if plan.dynamic:
                picks = plan.partial.picks.shape if isinstance(plan.partial, Route) else ()
                facts = plan.tokens, plan.patterns, plan.block_q, plan.block_k, self.device
                key = (*facts, picks, part, dense, asked)
                if key not in self._tallies:
                    self._tallies[key] = Tally(plan, part, dense, asked)
                self._tallies[key].add(plan)
            else:
                self._kept += part * plan.density * asked
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
        part: share of the N x N pairs of a call that a plan is over.
        dense: FLOPs of a call as dense attention.
        asked: see `Record.add`.
    """

    def __init__(
        self, plan: Plan, part: float = 1.0, dense: float = 1.0, asked: float = 1.0
    ) -> None:
        self.part, self.dense, self.tokens, self.asked = part, dense, plan.tokens, asked
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
            return kept * scale * self.asked, computed * scale
        blocks = int(self._seen) / self._plans_seen / self._patterns
        computed = min(1.0, blocks * self._pair)
        kept = int(self._picked) / self._plans_picked / self._groups
        scale = self.part * self._plans
        return min(kept, computed) * scale * self.asked, computed * scale


class Watch:
    """Errors of the sparse calls of a generation: some rows of the first call of each layer and
    step are computed exactly, and compared. Printable.

    Args:
        seen: by layer and step, mean squares of the error and of the exact rows, (2,).
    """

    def __init__(self, seen: Mapping[Key, Tensor] | None = None) -> None:
        self.seen = dict(seen or {})

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
        """Compare some rows of the last sample of q, k, v and out, (B, H, N, D), in a layer, by
        its name and number."""
        if (name, step) in self.seen:
            return
        g = torch.Generator().manual_seed(step * 10_007 + number)
        rows = torch.randint(q.shape[2], (min(ROWS, q.shape[2]),), generator=g).to(q.device)
        exact = F.scaled_dot_product_attention(q[-1:, :, rows], k[-1:], v[-1:], scale=scale)
        errors = out[-1:, :, rows] - exact
        squares = [x.float().square().mean() for x in (errors, exact)]
        self.seen[name, step] = torch.stack(squares)

    @property
    def calls(self) -> dict[Key, float]:
        """Relative L2 error of all heads, by layer and step. Waits for the device."""
        found = {key: squares.double().tolist() for key, squares in self.seen.items()}
        return {key: (error / max(all_, 1e-30)) ** 0.5 for key, (error, all_) in found.items()}

    @property
    def mean(self) -> float:
        """Mean of `calls`."""
        calls = self.calls
        return sum(calls.values()) / len(calls)

    def to_dict(self) -> dict[str, object]:
        calls = self.calls
        if not calls:
            return {}
        layer, step = max(calls, key=lambda key: calls[key])
        return {
            "mean_error": self.mean,
            "largest_error": calls[layer, step],
            "largest_at": {"layer": layer, "step": step},
        }

    def __str__(self) -> str:
        calls = self.calls
        if not calls:
            return "watch: no sparse call was seen"
        layer, step = max(calls, key=lambda key: calls[key])
        return (
            f"watch: attention error {self.mean:.3f} on average, at most "
            f"{calls[layer, step]:.3f} ({layer} at step {step})"
        )


@dataclass(frozen=True)
class LayerRow:
    """Work of one layer in a generation: what ran at each step, the least density of its steps,
    executed FLOPs over dense attention's, and seconds if timed."""

    steps: Mapping[int, str]
    density: float
    flops_share: float
    seconds: float | None


@dataclass(frozen=True)
class Summary:
    """Summary of a generation. Printable; `to_dict()` for a report, `explain()` for one step.

    Args:
        layers: all that the method was attached to, by name, and why each is dense at all steps.
        steps: each step to why all layers are dense there.
        passes: forward passes of the transformers in each step.
        watching: errors of some rows of the sparse calls; None without a watch.
        displaced: layers whose processors were exchanged, to the class of the new processor.
        seen_passes, paused: forward passes that ran, and inside `paused()`.
        one_graph: the whole model is one graph of torch.compile, which tells no step apart.
        in_graphs: blocks are graphs, in which the model's own attention leaves no record.
        recording: records are kept.
        padding: where equal keys of padded text were counted once, in words.
    """

    method: Method
    schedule: Schedule
    records: dict[Key, Record] = field(repr=False)
    layers: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    steps: Mapping[int, str | None] = field(default_factory=dict, repr=False)
    passes: Mapping[int, int] = field(default_factory=dict, repr=False)
    watching: Watch | None = field(default=None, repr=False)
    displaced: Mapping[str, str] = field(default_factory=dict, repr=False)
    seen_passes: int = field(default=0, repr=False)
    paused: int = field(default=0, repr=False)
    one_graph: bool = field(default=False, repr=False)
    in_graphs: bool = field(default=False, repr=False)
    recording: bool = field(default=True, repr=False)
    padding: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Add records of dense calls in graphs, which leave none, by the sizes of the others."""
        object.__setattr__(self, "records", dict(self.records))
        if not self.in_graphs or self.one_graph:
            return
        by_layer: dict[str, Record] = {}
        by_step: dict[int, Record] = {}
        for (name, step), record in self._sparse.items():
            by_layer.setdefault(name, record)
            by_step.setdefault(step, record)
        steps = {*self.steps, *(step for _, step in self.records)}
        for name, why in self.layers.items() if by_step else ():
            for step in steps:
                like = by_layer.get(name) or by_step.get(step) or next(iter(by_step.values()))
                reason = why or self.steps.get(step)
                if reason is not None and (name, step) not in self.records:
                    self.records[name, step] = like.as_dense(reason)

    @property
    def _sparse(self) -> dict[Key, Record]:
        return {key: record for key, record in self.records.items() if record.why_dense is None}

    @property
    def density(self) -> float | None:
        """Mean over the sparse calls; None when none ran."""
        sparse = self._sparse.values()
        calls = sum(record.calls for record in sparse)
        return sum(r.density * r.calls for r in sparse) / calls if calls else None

    @property
    def tokens(self) -> int:
        return max((record.tokens for record in self.records.values()), default=0)

    @property
    def flops(self) -> float:
        return sum(record.flops for record in self.records.values())

    @property
    def flops_share(self) -> float | None:
        """Executed attention FLOPs over dense attention's, in all layers and steps."""
        dense = sum(record.dense_flops for record in self.records.values())
        return self.flops / dense if dense else None

    @property
    def seconds(self) -> float | None:
        """Seconds spent in attention; None unless timed."""
        return _seconds(self.records.values())

    @property
    def learned(self) -> list[int]:
        """The steps at which a method with a memory learned."""
        return sorted({step for (_, step), record in self.records.items() if record.learned})

    @property
    def reused(self) -> list[int]:
        """The steps at which a method ran by its memory."""
        keeps = self.method.defines("step_state")
        return sorted({step for _, step in self._sparse}) if keeps else []

    @property
    def kernels(self) -> list[str]:
        """The kernels that ran, by name."""
        return _kernels(self.records.values())

    @property
    def _choices(self) -> list[str]:
        return sorted({str(r.choice) for r in self.records.values() if r.choice is not None})

    @property
    def rows(self) -> dict[str, LayerRow]:
        """A row for each layer that ran, by its name."""
        found: dict[str, dict[int, Record]] = {}
        for (name, step), record in self.records.items():
            found.setdefault(name, {})[step] = record
        return {
            name: LayerRow(
                {step: by[step].told for step in sorted(by)},
                min(record.density for record in by.values()),
                sum(r.flops for r in by.values()) / sum(r.dense_flops for r in by.values()),
                _seconds(by.values()),
            )
            for name, by in found.items()
        }

    def to_dict(self) -> dict[str, object]:
        steps = {"learned_steps": self.learned, "reused_steps": self.reused}
        return {
            "verdict": self.verdict(),
            "method": repr(self.method),
            "schedule": str(self.schedule),
            "kernels": self._choices,
            "tokens": self.tokens,
            "density": self.density,
            "sparsity": None if self.density is None else 1 - self.density,
            "attention_flops": self.flops,
            "attention_flops_share": self.flops_share,
            "attention_seconds": self.seconds,
            **(steps if self.method.defines("step_state") else {}),
            **({} if self.watching is None else {"watch": self.watching.to_dict()}),
            **({"padding": self.padding} if self.padding else {}),
            "layers": {name: vars(row) for name, row in self.rows.items()},
        }

    def _why_empty(self) -> str:
        """Say why nothing at all was recorded."""
        if not self.recording:
            return "nothing was recorded, as record=False says"
        if self.displaced:
            count, layers = len(self.displaced), len(self.layers)
            return (
                f"nothing of ours ran: {'all' if count == layers else f'{count} of'} {layers} "
                "attentions have other processors than those of attach, such as "
                f"{next(iter(self.displaced.values()))}; detach() and attach again"
            )
        if self.one_graph:
            return "nothing was recorded: the model is one graph, which tells no step apart"
        if self.paused and not self.seen_passes:
            return f"nothing was recorded: all {self.paused} forward passes ran inside paused()"
        if self.in_graphs and self.seen_passes:
            return (
                "nothing was recorded: all attention ran dense, in graphs of torch.compile, where "
                "the model's own leaves no record"
            )
        return "nothing ran yet"

    def verdict(self) -> str:
        """One line: how much less work attention was, where, and by what."""
        share, density, sparse = self.flops_share, self.density, self._sparse
        if share is None:
            return self._why_empty()
        if density is None:
            reasons = dict.fromkeys(str(r.why_dense) for r in self.records.values())
            by = f", kernel {' and '.join(self.kernels)}" if self.kernels else ""
            return f"attention ran dense throughout: {', '.join(reasons)}{by}"
        by = " and ".join(_kernels(sparse.values()))
        if density > 1 - 1e-9 and BY_ITSELF not in self.kernels:
            return f"nothing is left out at this size: density 1, kernel {by}"
        where = f"{len({name for name, _ in sparse})} of {len(self._names)} layers sparse"
        less = f"{1 / share:.1f}x less work" if share < 0.95 else f"{share:.2f} of dense attention"
        known = "" if self.kernels == [BY_ITSELF] else f", density {density:.2f}"
        steps = sorted({step for _, step in sparse})
        ran = sorted({step for _, step in self.records})
        when = f"at steps {spans(steps)}"
        if steps == ran:
            when = "at every step" if len(ran) > 1 else f"at step {ran[0]}"
        elif steps == [step for step in ran if step >= steps[0]]:
            when = f"from step {steps[0]}"
        return f"attention {less}: {where} {when}{known}, kernel {by}"

    def __str__(self) -> str:
        if not self.records:
            return f"{self.verdict()}\n{brief(self.method)}\n{brief(self.schedule)}"
        named = self._choices + [BY_ITSELF] * (BY_ITSELF in self.kernels)
        lines = [self.verdict(), brief(self.method), brief(self.schedule)]
        lines.append(f"kernel: {', '.join(named) or 'none, all dense'}")
        if self.density is not None:
            lines.append(
                f"{self.tokens} tokens, density {self.density:.3f} "
                f"(sparsity {1 - self.density:.3f}) where sparse"
            )
            ran, sparse = ({step for _, step in some} for some in (self.records, self._sparse))
            if small := too_small(self.tokens, len(ran), sparse):
                lines.append(small)
        lines.append(
            f"attention FLOPs executed: {self.flops:.3g}, {self.flops_share:.3f} of dense"
        )
        if self.seconds is not None:
            lines.append(f"attention took {self.seconds:.2f} s")
        if self.method.defines("step_state"):
            made, used = (
                f"{len(steps)} steps ({spans(steps)})" if steps else "no step"
                for steps in (self.learned, self.reused)
            )
            lines.append(f"learned at {made}, reused at {used}")
        if self.watching is not None:
            lines.append(str(self.watching))
        if self.padding:
            lines.append(self.padding)
        lines += self._grouped()
        if self.displaced:
            lines.append(
                f"  {len(self.displaced)} layers have other processors, and run dense: "
                f"{', '.join(self.displaced)}"
            )
        return "\n".join(lines)

    def _grouped(self) -> Iterator[str]:
        """A line for each group of layers that did the same at the same steps."""
        groups: dict[tuple, dict[str, LayerRow]] = {}
        for name, row in self.rows.items():
            same = tuple(row.steps.items()), round(row.density, 2)
            groups.setdefault(same, {})[name] = row
        for (steps, _), rows in groups.items():
            kinds: dict[str, list[int]] = {}
            for step, kind in steps:
                kinds.setdefault(kind, []).append(step)
            what = "; ".join(
                f"{len(at)} x {kind}, step{'s' if len(at) > 1 else ''} {spans(at)}"
                for kind, at in kinds.items()
            )
            share = sum(row.flops_share for row in rows.values()) / len(rows)
            seconds = [row.seconds for row in rows.values() if row.seconds is not None]
            timed = f"  {sum(seconds):.2f} s" if seconds else ""
            yield f"  {called([*rows])}: {what}  FLOPs {share:.3f}{timed}"

    @property
    def _names(self) -> list[str]:
        return list(self.layers) or list(dict.fromkeys(name for name, _ in self.records))

    def explain(self, step: int | None = None, layer: str | int | None = None) -> str:
        """Explain which attention ran and why: at one step, in one layer, or both.

        Args:
            step: from 0. Without: each that ran.
            layer: its name, the end of it, or the number of its block. Without: all.

        Raises:
            ValueError: no layer is called that.
        """
        names = self._names
        if layer is not None:
            names = [name for name in names if name == layer or name.endswith(f".{layer}")]
            if not names:
                known = ", ".join(self._names)
                raise ValueError(f"layer must be one of {known}, got {shown(layer)}")
        ran = sorted({*self.steps, *(step for _, step in self.records)})
        if not ran:
            why = self._why_empty()
            return self.verdict() if step is None else f"step {step}: {why}"
        if step is not None and step not in ran:
            also = f", and {self.paused} passes inside paused()" if self.paused else ""
            return f"step {step} did not run: the last generation had steps {spans(ran)}{also}"
        lines = []
        for one in ran if step is None else [step]:
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(self._why(name, one), []).append(name)
            lines += [f"step {one}, {called(some)}: {why}" for why, some in groups.items()]
        return "\n".join(lines)

    def _why(self, layer: str, step: int) -> str:
        record = self.records.get((layer, step))
        if record is not None and record.why_dense is not None:
            where = ", in a graph of torch.compile" if record.in_graph else ""
            what = ", and learned from" if record.learned else ""
            by = "" if record.choice is None else f", by {record.choice}"
            return f"dense ({record.why_dense}){what}{by}{where}"
        if record is not None and record.by_itself:
            return f"{type(self.method).__name__} by {BY_ITSELF}: what it leaves out is not known"
        if record is not None and record.density > 1 - 1e-9:
            return f"sparse by name: nothing is left out at this size, by {record.choice}"
        if record is not None:
            return f"sparse, density {record.density:.3f}, by {record.choice}"
        there = self.displaced.get(layer)
        if there is not None:
            return f"dense: a {there} has taken the place of attach's processor; attach again"
        if not self.recording:
            return self._why_empty()
        if self.one_graph:
            return "not recorded: the model is one graph, which tells no step apart"
        dense = self.layers.get(layer) or self.steps.get(step)
        if self.in_graphs and dense is not None:
            return f"dense ({dense}), in a graph of torch.compile"
        part = layer.partition(".")[0]
        beside = any(at == step and name.startswith(f"{part}.") for name, at in self.records)
        only = len({name.partition(".")[0] for name in self.layers}) == 1
        if beside or (self.passes.get(step) and only):
            return "not called, though its model ran: a cache or a hook skipped this block"
        return "not called: its model did not run at this step"


def _seconds(records: Iterable[Record]) -> float | None:
    known = [record.seconds for record in records if record.seconds is not None]
    return sum(known) if known else None


def _kernels(records: Iterable[Record]) -> list[str]:
    records = list(records)
    chosen = {record.choice.kernel for record in records if record.choice is not None}
    return sorted(chosen) + [BY_ITSELF] * any(record.by_itself for record in records)


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
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            plain.append(name)
            continue
        ends = ".".join(parts[:at]), ".".join(parts[at + 1 :])
        groups.setdefault(ends, []).append(int(parts[at]))
    drawn = [
        ".".join(filter(None, (before, spans(sorted(set(numbers))), after)))
        for (before, after), numbers in groups.items()
    ]
    return ", ".join(plain + drawn)
