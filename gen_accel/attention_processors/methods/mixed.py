"""Mixed attention: a method for each layer, head and step, by rules.

`gen_accel.tune` finds the rules. Heads whose plans share a layout run in one launch of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from gen_accel.attention_processors.methods.dense import Dense
from gen_accel.kernels.base import Runner, name_of, scale_of
from gen_accel.method import Box, Method, RunPlan, Step, check_method
from gen_accel.parsing import Count, Natural, check_options, shown
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
    layers: tuple[Natural, ...] | None = None
    heads: tuple[Natural, ...] | None = None
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_method(self.method)
        remembers = self.method.defines("step_state")
        if remembers or self.method.changes_by:
            raise ValueError(
                f"a rule's method must be the same at each of its steps, got "
                f"{type(self.method).__name__}, which "
                f"{'remembers earlier ones' if remembers else 'changes'}: "
                "give rules for other steps"
            )
        for name in ("layers", "heads"):
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or len({*numbers}) < len(numbers)):
                raise ValueError(
                    f"{name} of a rule must be different numbers from 0 on, or None for all, got "
                    f"{numbers}"
                )
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise ValueError(
                f"steps of a rule must be (first, end) with 0 <= first < end, got {self.steps}"
            )


@dataclass(frozen=True)
class Mixed(Method):
    """Methods by rules for layers, heads and steps. The first rule that fits decides; if none
    fits, attention is dense.

        Mixed((Rule(Dense(), steps=(1, 3)), Rule(Piecewise(0.2))), steps=20)

    A method with parameters, such as `SparseLinear`, runs without them here.

    Args:
        rules: the earlier ones win.
        steps: denoising steps of a generation; a run of another number of steps is refused, as no
            rule travels.
    """

    rules: tuple[Rule, ...]
    steps: Count

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ValueError(f"rules must be one Rule or more, got {shown(self.rules)}")
        check_options(self)
        beyond = [one.steps for one in self.rules if one.steps and one.steps[1] > self.steps]
        if beyond:
            raise ValueError(f"a rule is for steps {beyond[0]}, of {self.steps} steps in all")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        """Compute the first step of the first layer. On a model, each layer and step has its own
        method."""
        return self.for_layer(0).methods[0](q, k, v, video=video, kernel=kernel)

    def __str__(self) -> str:
        kinds = sorted({type(rule.method).__name__ for rule in self.rules})
        return f"Mixed: {len(self.rules)} rules for {self.steps} steps, by {', '.join(kinds)}"

    def for_layer(self, layer: int) -> "Mixed":
        """Rules of one layer, counted from 0, which name no layers."""
        own = (
            replace(rule, method=rule.method.for_layer(layer), layers=None)
            for rule in self.rules
            if rule.layers is None or layer in rule.layers
        )
        return Mixed((*own,) or (Rule(Dense()),), self.steps)

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """Method of each step, of rules for one layer."""
        found = []
        for step in range(self.steps):
            some = [
                (rule.method, rule.heads)
                for rule in self.rules
                if rule.steps is None or rule.steps[0] <= step < rule.steps[1]
            ]
            method, heads = some[0] if some else (Dense(), None)
            found.append(method if heads is None else MixedHeads(tuple(some)))
        return tuple(found)

    def at(self, step: Step) -> Method:
        """Method of a step, of rules for one layer; ValueError in a run of another number of
        steps."""
        if step.total is not None and step.total != self.steps:
            raise ValueError(
                f"the rules are for {self.steps} steps, this run has {step.total}: solve "
                "them again from their profile, gen-accel tune --preset FILE --steps "
                f"{step.total} --out NEW"
            )
        if step.number >= self.steps:
            raise ValueError(f"the rules are for {self.steps} steps, this is step {step.number}")
        return self.methods[step.number]

    @property
    def changes_by(self) -> Literal["number"]:
        return "number"

    @property
    def is_dense(self) -> bool:
        """Whether all steps of all layers are dense."""
        return not self.named_layers and all(method.is_dense for method in self.methods)

    def unfit(self, model: str, layer: int, heads: int) -> str:
        """Say why a layer of a transformer cannot run the methods of its rules; "" if it
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
        return _least_of([rule.method for rule in self.rules])

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _first_sparse([rule.method for rule in self.rules]).planned(video, device)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that are kept, the mean over the layers, heads and steps that the
        rules name. A rule for all layers or heads counts as one."""
        layers, heads = self.named_layers or (0,), self.named_heads or (0,)
        known: dict[Method, float] = {}
        total = 0.0
        for layer in layers:
            for method in self.for_layer(layer).methods:
                for head in heads:
                    one = head_method(method, head)
                    if one not in known:
                        known[one] = one.density(video)
                    total += known[one]
        return total / (len(layers) * len(heads) * self.steps)


@dataclass(frozen=True)
class MixedHeads(Method):
    """Methods of the heads of one layer at one step.

    Args:
        some: methods with their heads, None for all. The first that names a head decides; a head
            that none names is dense.
        first: number of the first head that q, k and v hold.
    """

    some: tuple[tuple[Method, tuple[int, ...] | None], ...]
    first: int = 0

    def for_heads(self, heads: slice) -> "MixedHeads":
        return MixedHeads(self.some, self.first + (heads.start or 0))

    def within(self, video: VideoShape, whole: VideoShape) -> "MixedHeads":
        changed = ((one.within(video, whole), heads) for one, heads in self.some)
        return MixedHeads(tuple(changed), self.first)

    def for_device(self, device: torch.device) -> "MixedHeads":
        changed = ((one.for_device(device), heads) for one, heads in self.some)
        return MixedHeads(tuple(changed), self.first)

    @property
    def least_grid(self) -> Box:
        return _least_of([one for one, _ in self.some])

    def __hash__(self) -> int:  # asked for at each call
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.some, self.first))

    def method_of(self, head: int) -> Method:
        """Method of a head, by its number in the layer."""
        return next((m for m, heads in self.some if heads is None or head in heads), Dense())

    def groups(self, heads: int) -> tuple["Group", ...]:
        """Methods of the first so many heads, each with its heads, counted from `first`."""
        found: dict[Method, list[int]] = {}
        for head in range(heads):
            found.setdefault(self.method_of(self.first + head), []).append(head)
        return tuple((method, tuple(some)) for method, some in found.items())

    def plan(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return _first_sparse([one for one, _ in self.some]).planned(video, device)

    def density(self, video: VideoShape) -> float:
        """Mean over the heads that are named."""
        named = sorted({head for _, heads in self.some for head in heads or ()}) or [0]
        return sum(self.method_of(head).density(video) for head in named) / len(named)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        """Compute each head by its method: at most one launch a layout."""
        groups = merged(self, q.shape[1])
        if len(groups) == 1:
            return groups[0][0](q, k, v, video=video, kernel=kernel)
        out: Tensor | None = None  # in place, so that no head's output is there twice
        for heads, run in _launches(groups, q, k, v, video, kernel):
            some = _of_heads(q, heads), _of_heads(k, heads), _of_heads(v, heads)
            if isinstance(run, Plan):
                part = kernel(*some, run)
            else:
                part = run(*some, video=video, kernel=kernel)
            if len(heads) == q.shape[1]:
                return part
            if out is None:
                out = part.new_empty(*q.shape[:3], part.shape[3])
            out.index_copy_(1, numbers_on(heads, out.device), part)
        assert out is not None
        return out


Group = tuple[Method, tuple[int, ...]]  # a method, and the heads that it computes
# Heads that are computed at once, and their plan, or a method that runs by itself.
Launch = tuple[tuple[int, ...], Plan | Method]


@lru_cache(maxsize=4096)
def merged(mixed: MixedHeads, heads: int) -> tuple[Group, ...]:
    """`MixedHeads.groups`, with methods that can choose for several heads at once made one."""
    parts: list[Group] = []
    for method, some in mixed.groups(heads):
        if not method.defines("for_heads"):
            parts.append((method, some))
            continue
        for head in some:  # each has its own part, to be put together again
            at = mixed.first + head
            parts.append((method.for_heads(slice(at, at + 1)), (head,)))
    joins = [type(method) for method, _ in parts if method.defines("together")]
    parts.sort(key=lambda part: 1 + joins.index(type(part[0])) if type(part[0]) in joins else 0)
    groups: list[dict[int, Method]] = []
    for method, some in parts:
        own = dict.fromkeys(some, method)
        like = next((one for one in groups if _joint(one | own) is not None), None)
        if like is None:
            groups.append(own)
        else:
            like.update(own)
    return tuple((_joint(one) or Dense(), tuple(sorted(one))) for one in groups)


def _joint(of_head: dict[int, Method]) -> Method | None:
    """One method for heads, by their numbers, in the place of their own; None if there is none."""
    method, *others = dict.fromkeys(of_head.values())
    if not others:
        return method
    if any(type(one) is not type(method) for one in others):
        return None
    return method.together([of_head[head] for head in sorted(of_head)])


def _launches(
    groups: Sequence[Group],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video: VideoShape,
    kernel: RunPlan,
) -> list[Launch]:
    """Plan each group, and join plans that share a layout. Dense heads join the first of them."""
    launches: list[Launch] = []
    shared: list[list[tuple[tuple[int, ...], Plan]]] = []
    dense: tuple[int, ...] = ()
    for method, heads in groups:
        if method.is_dense:
            dense = heads
            continue
        some = _of_heads(q, heads), _of_heads(k, heads), _of_heads(v, heads)
        plan = _plan_of_call(method, *some, video, kernel)
        if plan is None or not plan.can_join:
            launches.append((heads, method if plan is None else plan))
            continue
        like = next((parts for parts in shared if parts[0][1].lies_as(plan)), None)
        if like is None:
            shared.append([(heads, plan)])
        else:
            like.append((heads, plan))
    if dense and shared:
        shared[0].append((dense, shared[0][0][1].keeping_all()))
    elif dense:
        launches.append((dense, Dense()))
    for parts in shared:
        heads = tuple(sorted(head for some, _ in parts for head in some))
        plans = [(tuple(heads.index(head) for head in some), plan) for some, plan in parts]
        launches.append((heads, plans[0][1] if len(parts) == 1 else joined(plans, len(heads))))
    return launches


def _plan_of_call(
    method: Method, q: Tensor, k: Tensor, v: Tensor, video: VideoShape, kernel: RunPlan
) -> Plan | None:
    """Plan that a method runs; None unless it returns what the kernel does, as it is."""
    found: list[Plan] = []
    # Of no memory: a method that reads it is one that runs by itself.
    stand_in = q.new_zeros(()).expand(q.shape)

    def take(of_q: Tensor, of_k: Tensor, of_v: Tensor, plan: Plan) -> Tensor:
        same = of_q is q and of_k is k and of_v is v
        found.extend([plan] if same else [plan, plan])
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


def _least_of(methods: Sequence[Method]) -> Box:
    """Least grid that all methods can plan."""
    sizes = [method.least_grid for method in methods] or [(1, 1, 1)]
    frames, rows, columns = (max(axis) for axis in zip(*sizes, strict=True))
    return frames, rows, columns


def _of_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of (B, H, N, D), a view if they lie together."""
    if len(heads) == x.shape[1]:
        return x
    if heads[-1] - heads[0] == len(heads) - 1:
        return x[:, heads[0] : heads[-1] + 1]
    return x.index_select(1, numbers_on(heads, x.device))
