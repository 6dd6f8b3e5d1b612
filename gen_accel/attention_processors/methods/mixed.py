"""Mixed attention: a method for each layer, head and step, by rules.

`gen_accel.tune` finds the rules. Heads whose plans share a layout run in one launch of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.kernels.base import Runner, name_of, scale_of
from gen_accel.method import Box, Method, RunPlan, Step, check_method
from gen_accel.parsing import check_types
from gen_accel.plan import Plan, joined, numbers_on
from gen_accel.video import VideoShape


@dataclass(frozen=True)
class Rule:
    """A method, and where it runs.

    Args:
        method: any but one that changes from step to step by itself or remembers earlier steps.
            `Dense()` is the model's own attention.
        layers: numbers of blocks; None: all.
        heads: numbers in the whole layer, even where a process holds a part of it; None: all.
        steps: (first, end), the steps first to end - 1; None: all.
    """

    method: Method
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_method(self.method)
        if self.method.keeps_state or self.method.changes_by:
            raise ValueError(
                f"a rule's method must be the same at each of its steps, got "
                f"{type(self.method).__name__}, which "
                f"{'remembers earlier ones' if self.method.keeps_state else 'changes'}: "
                "give rules for other steps"
            )
        for name in ("layers", "heads"):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            object.__setattr__(self, name, tuple(numbers))
            if not numbers or min(numbers) < 0 or len({*numbers}) < len(numbers):
                raise ValueError(
                    f"{name} of a rule must be different numbers from 0 on, or None for all, got "
                    f"{numbers}"
                )
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))
            first, end = self.steps
            if not 0 <= first < end:
                raise ValueError(
                    f"steps of a rule must be (first, end) with 0 <= first < end, got {self.steps}"
                )

    def fits(self, layer: int, step: int) -> bool:
        """Whether it may run in a layer at a step."""
        inside = self.steps is None or self.steps[0] <= step < self.steps[1]
        return inside and (self.layers is None or layer in self.layers)


@dataclass(frozen=True)
class Mixed(Method):
    """Methods by rules for layers, heads and steps. The first rule that fits decides; where none
    fits, attention is dense.

        Mixed((Rule(Dense(), steps=(1, 3)), Rule(Piecewise(0.2))), steps=20)

    A method with parameters, such as `SparseLinear`, runs without them here.

    Args:
        rules: the earlier ones win.
        steps: denoising steps of a generation; a run of another number of steps is refused, as no
            rule travels.
    """

    rules: tuple[Rule, ...]
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ValueError(f"rules must be one Rule or more, got {self.rules!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a number of steps, 1 or more, got {self.steps!r}")
        beyond = [one.steps for one in self.rules if one.steps and one.steps[1] > self.steps]
        if beyond:
            raise ValueError(f"a rule is for steps {beyond[0]}, of {self.steps} steps in all")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        """Compute the first step of the first layer. On a model, each layer and step has its own
        method."""
        return self._first(q, k, v, video=video, kernel=kernel)

    def __str__(self) -> str:
        kinds = sorted({type(rule.method).__name__ for rule in self.rules})
        return f"Mixed: {len(self.rules)} rules for {self.steps} steps, by {', '.join(kinds)}"

    @property
    def _first(self) -> Method:
        return self.for_layer(0).methods[0]

    def for_layer(self, layer: int) -> "MixedLayer":
        """Methods of one layer, counted from 0, by step."""
        return MixedLayer(
            tuple(
                MixedHeads(
                    tuple(
                        Some(rule.method.for_layer(layer), rule.heads)
                        for rule in self.rules
                        if rule.fits(layer, step)
                    )
                ).reduced
                for step in range(self.steps)
            )
        )

    def unfit(self, model: str, layer: int, heads: int) -> str:
        """Say why a layer of a transformer cannot run the methods of its rules; "" where it
        can."""
        reasons = (
            rule.method.unfit(model, layer, heads)
            for rule in self.rules
            if rule.layers is None or layer in rule.layers
        )
        return next(filter(None, reasons), "")

    @property
    def named_layers(self) -> tuple[int, ...]:
        """Layers that a rule names."""
        return tuple(sorted({layer for rule in self.rules for layer in rule.layers or ()}))

    @property
    def named_heads(self) -> tuple[int, ...]:
        """Heads that a rule names."""
        return tuple(sorted({head for rule in self.rules for head in rule.heads or ()}))

    @property
    def least_grid(self) -> Box:
        return least_of([rule.method for rule in self.rules])

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _first_sparse([rule.method for rule in self.rules]).planned(video, device)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that are kept, the mean over the layers, heads and steps that the
        rules name. A rule for all layers or heads counts as one."""
        layers, heads = self.named_layers or (0,), self.named_heads or (0,)
        known: dict[Any, float] = {}
        total = 0.0
        for layer in layers:
            of_layer = self.for_layer(layer)
            for method in of_layer.methods:
                for head in heads:
                    one = head_method(method, head)
                    if one not in known:
                        known[one] = one.density(video)
                    total += known[one]
        return total / (len(layers) * len(heads) * self.steps)


Group = tuple[Method, tuple[int, ...]]  # a method, and the heads that it computes


class Some(NamedTuple):
    """A method for some heads; None for all."""

    method: Method
    heads: tuple[int, ...] | None


@dataclass(frozen=True)
class MixedLayer(Method):
    """Methods of one layer.

    Args:
        methods: one a step.
    """

    methods: tuple[Method, ...]

    @property
    def is_dense(self) -> bool:
        """Whether all steps are dense."""
        return all(method.is_dense for method in self.methods)

    @property
    def least_grid(self) -> Box:
        return least_of(self.methods)

    @property
    def changes_by(self) -> Literal["number"]:
        return "number"

    def at(self, step: Step) -> Method:
        """Method of a step; ValueError in a run of another number of steps."""
        if step.total is not None and step.total != len(self.methods):
            raise ValueError(
                f"the rules are for {len(self.methods)} steps, this run has {step.total}: solve "
                "them anew from their profile, gen-accel tune --preset FILE --steps "
                f"{step.total} --out NEW"
            )
        if step.number >= len(self.methods):
            raise ValueError(
                f"the rules are for {len(self.methods)} steps, this is step {step.number}"
            )
        return self.methods[step.number]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        return self.methods[0](q, k, v, video=video, kernel=kernel)

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _first_sparse(self.methods).planned(video, device)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.methods)


@dataclass(frozen=True)
class MixedHeads(Method):
    """Methods of the heads of one layer at one step.

    Args:
        some: the first that names a head decides; a head that none names is dense.
        first: number of the first head that q, k and v hold.
    """

    some: tuple[Some, ...]
    first: int = 0

    @property
    def reduced(self) -> Method:
        """The one method that all heads have, where they have one; else itself."""
        if not self.some:
            return Dense()
        method, heads = self.some[0]
        return method if heads is None else self

    def for_heads(self, heads: slice) -> "MixedHeads":
        """Methods of a process that holds these heads of the layer."""
        return MixedHeads(self.some, self.first + (heads.start or 0))

    def within(self, video: VideoShape, whole: VideoShape) -> "MixedHeads":
        """Methods for a smaller grid than the model's."""
        changed = (Some(one.within(video, whole), heads) for one, heads in self.some)
        return MixedHeads(tuple(changed), self.first)

    def for_device(self, device: torch.device) -> "MixedHeads":
        """Methods with the options that a device decides."""
        changed = (Some(one.for_device(device), heads) for one, heads in self.some)
        return MixedHeads(tuple(changed), self.first)

    @property
    def least_grid(self) -> Box:
        return least_of([one.method for one in self.some])

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.some, self.first))

    def method_of(self, head: int) -> Method:
        """Method of a head, by its number in the layer."""
        return next((m for m, heads in self.some if heads is None or head in heads), Dense())

    def groups(self, heads: int) -> tuple[Group, ...]:
        """Methods of the first so many heads, each with its heads, counted from `first`."""
        found: dict[Any, list[int]] = {}
        for head in range(heads):
            found.setdefault(self.method_of(self.first + head), []).append(head)
        return tuple((method, tuple(some)) for method, some in found.items())

    def merged(self, heads: int) -> tuple[Group, ...]:
        """`groups`, where methods that can choose for several heads at once are one."""
        return _merged(self, heads)

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _first_sparse([one.method for one in self.some]).planned(video, device)

    def density(self, video: VideoShape) -> float:
        """Mean over the heads that are named."""
        named = sorted({head for one in self.some for head in one.heads or ()}) or [0]
        return sum(self.method_of(head).density(video) for head in named) / len(named)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        """Compute each head by its method: at most one launch a layout."""
        groups = self.merged(q.shape[1])
        if len(groups) == 1:
            return groups[0][0](q, k, v, video=video, kernel=kernel)
        out = torch.empty_like(q) if not _needs_grad(q, k, v) else None
        made: list[tuple[tuple[int, ...], Tensor]] = []
        for launch in _launches(groups, q, k, v, video, kernel):
            some = (
                _of_heads(q, launch.heads),
                _of_heads(k, launch.heads),
                _of_heads(v, launch.heads),
            )
            if launch.plan is not None:
                part = kernel(*some, launch.plan)
            else:
                part = launch.method(*some, video=video, kernel=kernel)
            if out is None:
                made.append((launch.heads, part))
            elif len(launch.heads) == q.shape[1]:
                return part
            else:
                _put(out, launch.heads, part)
        return _sorted(made) if out is None else out


@lru_cache(maxsize=4096)
def _merged(mixed: MixedHeads, heads: int) -> tuple[Group, ...]:
    groups: list[Group] = []
    alike: dict[type, list[Group]] = {}
    for method, some in mixed.groups(heads):
        for one, own in _own_heads(method, some, mixed.first):
            if type(one).together is Method.together:
                groups.append((one, own))
            else:
                alike.setdefault(type(one), []).append((one, own))
    for several in alike.values():
        groups += _at_once(several)
    return tuple(groups)


def _own_heads(method: Method, heads: tuple[int, ...], first: int) -> list[Group]:
    """Give each head its own part of a method whose heads differ, to be put together again.

    Args:
        heads: counted from `first`.
    """
    if not method.heads_differ:
        return [(method, heads)]
    return [(method.for_heads(slice(first + head, first + head + 1)), (head,)) for head in heads]


def _at_once(
    groups: list[Group],
) -> list[Group]:
    """Put groups of one kind of method together, where the method can."""
    left, made = list(groups), []
    while left:
        method, heads = left.pop(0)
        of_head = dict.fromkeys(heads, method)
        for other in list(left):
            wanted = of_head | dict.fromkeys(other[1], other[0])
            if method.together([wanted[head] for head in sorted(wanted)]) is not None:
                of_head = wanted
                left.remove(other)
        order = tuple(sorted(of_head))
        joint = method.together([of_head[head] for head in order])
        made.append((method if joint is None or len({*of_head.values()}) == 1 else joint, order))
    return made


class _Launch(NamedTuple):
    """Heads that are computed at once.

    Args:
        plan: of these heads; None where the method runs by itself.
    """

    heads: tuple[int, ...]
    method: Method
    plan: Plan | None


def _launches(
    groups: Sequence[Group],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video: VideoShape,
    kernel: RunPlan,
) -> list[_Launch]:
    """Plan each group, and join the plans that share a layout. Dense heads take the layout of the
    first plan of whole blocks, with all blocks kept."""
    alone: list[_Launch] = []
    shared: list[list[tuple[tuple[int, ...], Plan]]] = []
    dense: tuple[int, ...] = ()
    for method, heads in groups:
        if method.is_dense:
            dense = heads
            continue
        some = _of_heads(q, heads), _of_heads(k, heads), _of_heads(v, heads)
        plan = _plan_of_call(method, *some, video, kernel)
        if plan is None or not plan.can_join:
            alone.append(_Launch(heads, method, plan))
            continue
        for parts in shared:
            if parts[0][1].lies_as(plan):
                parts.append((heads, plan))
                break
        else:
            shared.append([(heads, plan)])
    if dense and shared:
        first = shared[0][0][1]
        shared[0].append((dense, first.keeping_all()))
    elif dense:
        alone.append(_Launch(dense, Dense(), None))
    for parts in shared:
        heads = tuple(sorted(head for some, _ in parts for head in some))
        plans = [(tuple(heads.index(head) for head in some), plan) for some, plan in parts]
        plan = plans[0][1] if len(parts) == 1 else joined(plans, len(heads))
        alone.append(_Launch(heads, Dense(), plan))
    return alone


def _plan_of_call(
    method: Method, q: Tensor, k: Tensor, v: Tensor, video: VideoShape, kernel: RunPlan
) -> Plan | None:
    """Plan that a method runs, for a method that returns what the kernel does, as it is; None for
    another."""
    found: list[Plan] = []
    # Of no memory: a method that reads it is one that runs by itself.
    stand_in = q.new_zeros(()).expand(q.shape)

    def take(*call: Any) -> Tensor:
        same = all(given is own for given, own in zip(call[:3], (q, k, v), strict=True))
        found.extend([call[3]] if same else [call[3], call[3]])
        return stand_in

    runner = Runner(take, name_of(kernel), scale_of(kernel, q))
    with torch.no_grad():
        out = method(q, k, v, video=video, kernel=runner)
    return found[0] if out is stand_in and len(found) == 1 else None


def head_method(method: Method, head: int) -> Method:
    """Method of one head at a step of `MixedLayer`."""
    return method.method_of(head) if isinstance(method, MixedHeads) else method


def _first_sparse(methods: Sequence[Method]) -> Method:
    return next((method for method in methods if not method.is_dense), Dense())


def least_of(methods: Sequence[Method]) -> Box:
    """Least grid that all methods can plan."""
    sizes = [method.least_grid for method in methods] or [(1, 1, 1)]
    frames, rows, columns = (max(axis) for axis in zip(*sizes, strict=True))
    return frames, rows, columns


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _of_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of (B, H, N, D), a view where they lie together."""
    if len(heads) == x.shape[1]:
        return x
    if heads[-1] - heads[0] == len(heads) - 1:
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, numbers_on(heads, x.device))


def _put(out: Tensor, heads: tuple[int, ...], part: Tensor) -> None:
    if heads[-1] - heads[0] == len(heads) - 1:
        out[:, heads[0] : heads[-1] + 1] = part
    else:
        out.index_copy_(1, numbers_on(heads, out.device), part)


def _sorted(made: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Put the parts of all heads in the order of their heads."""
    order = [head for heads, _ in made for head in heads]
    whole = torch.cat([part for _, part in made], 1)
    return whole[:, [order.index(head) for head in range(len(order))]]
