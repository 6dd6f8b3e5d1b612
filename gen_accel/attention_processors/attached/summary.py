"""Summary of a generation: a verdict, a line for each group of layers, and why a call ran so."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gen_accel.attention_processors.attached.records import Key, Record, WatchedErrors
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.method import Method

BY_ITSELF = "its own code, without a kernel"


@dataclass(frozen=True)
class Unrecorded:
    """Layers and passes that left no record.

    Args:
        displaced: layers whose processors were exchanged, to the class of the new processor.
        layers: how many there are.
        passes: forward passes that ran.
        paused: forward passes inside `paused()`.
        one_graph: the whole model is one graph of torch.compile, in which steps cannot be told
            apart.
        in_graphs: blocks are graphs, in which the model's own attention leaves no record.
        recording: records are kept.
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
class LayerRow:
    """Work of one layer in a generation.

    Args:
        steps: each step to what ran there.
        density: the least of its steps.
        flops_share: executed FLOPs over dense attention's.
        seconds: in all; None unless timed.
    """

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
        unrecorded: layers and passes without a record.
        watching: errors of some rows of the sparse calls; None without a watch.
    """

    method: Method
    schedule: Schedule
    records: dict[Key, Record] = field(repr=False)
    layers: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    steps: Mapping[int, str | None] = field(default_factory=dict, repr=False)
    passes: Mapping[int, int] = field(default_factory=dict, repr=False)
    unrecorded: Unrecorded = field(default_factory=Unrecorded, repr=False)
    watching: WatchedErrors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Add records of dense calls in graphs, which leave none, by the sizes of the others."""
        object.__setattr__(self, "records", dict(self.records))
        if not self.unrecorded.in_graphs or self.unrecorded.one_graph:
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
    def flops_share(self) -> float | None:
        """Executed attention FLOPs over dense attention's, in all layers and steps."""
        dense = sum(record.dense_flops for record in self.records.values())
        return sum(record.flops for record in self.records.values()) / dense if dense else None

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
        chosen = {str(r.choice) for r in self.records.values() if r.choice is not None}
        steps = {"learned_steps": self.learned, "reused_steps": self.reused}
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
            **(steps if self.method.defines("step_state") else {}),
            **({} if self.watching is None else {"watch": self.watching.to_dict()}),
            "layers": {name: vars(row) for name, row in self.rows.items()},
        }

    def verdict(self) -> str:
        """One line: how much less work attention was, where, and by what."""
        share, density, sparse = self.flops_share, self.density, self._sparse
        if share is None:
            return self.unrecorded.why_empty()
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
            return f"{self.verdict()}\n{self.method}\n{self.schedule}"
        data = self.to_dict()
        chosen = {str(r.choice) for r in self.records.values() if r.choice is not None}
        named = sorted(chosen) + [BY_ITSELF] * (BY_ITSELF in self.kernels)
        lines = [self.verdict(), str(self.method), str(self.schedule)]
        lines.append(f"kernel: {', '.join(named) or 'none, all dense'}")
        if self.density is not None:
            lines.append(
                f"{data['tokens']} tokens, density {self.density:.3f} "
                f"(sparsity {1 - self.density:.3f}) where sparse"
            )
        lines.append(
            f"attention FLOPs executed: {data['attention_flops']:.3g}, {self.flops_share:.3f} of "
            "dense"
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
        lines += self._grouped()
        if displaced := self.unrecorded.displaced:
            lines.append(
                f"  {len(displaced)} layers have other processors, and run dense: "
                f"{', '.join(displaced)}"
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
                raise ValueError(f"layer must be one of {known}, got {layer!r}")
        ran = sorted({*self.steps, *(step for _, step in self.records)})
        if not ran:
            why = self.unrecorded.why_empty()
            return self.verdict() if step is None else f"step {step}: {why}"
        if step is not None and step not in ran:
            paused = self.unrecorded.paused
            also = f", and {paused} passes inside paused()" if paused else ""
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
        there = self.unrecorded.displaced.get(layer)
        if there is not None:
            return f"dense: a {there} has taken the place of attach's processor; attach again"
        if not self.unrecorded.recording:
            return self.unrecorded.why_empty()
        if self.unrecorded.one_graph:
            return "not recorded: the model is one graph, which tells no step apart"
        dense = self.layers.get(layer) or self.steps.get(step)
        if self.unrecorded.in_graphs and dense is not None:
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
