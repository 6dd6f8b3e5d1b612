"""Watch over what runs: some rows of each sparse call are computed exactly, and compared.

The attention error of a run is known so, call by call. With a ladder, which knows what error to
expect, a head that errs twice as much runs denser from the next step on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_accel.attention_processors.methods.mixed import MixedHeads, Some, head_method

ROWS = 64
LIMIT = 2.0  # times the expected error, above which the next step is denser


class Ladder(Protocol):
    """Knowledge of a profile about the heads of a layer at a step, counted from 0."""

    def expected(self, step: int, layer: int, head: int, method: Any) -> float | None:
        """Relative error of a method's attention; None where it was not measured."""
        ...

    def denser(self, step: int, layer: int, head: int, method: Any) -> Any:
        """Next method that errs less, at more cost; the same where there is none."""
        ...


class Seen(NamedTuple):
    """Mean squares over the rows of one call, (H,) each, on the call's device.

    Args:
        method: that ran.
        first: number of the first head.
    """

    errors: Tensor
    squares: Tensor
    layer: int
    method: Any
    first: int


@dataclass(frozen=True)
class Watched:
    """Errors of one layer at one step.

    Args:
        error: root of the squared error over the squares of the exact output, of all heads.
        expected: the same by the profile; None without one.
        exceeded: heads that erred more than `LIMIT` times what was expected.
    """

    error: float
    expected: float | None = None
    exceeded: int = 0


@dataclass(frozen=True)
class Watching:
    """Errors that a watch saw in a generation. Printable.

    Args:
        calls: by the name of a layer and the step.
    """

    calls: Mapping[tuple[str, int], Watched] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(one.error for one in self.calls.values()) / len(self.calls)

    @property
    def largest(self) -> tuple[str, int]:
        """Layer and step with the largest error."""
        return max(self.calls, key=lambda key: self.calls[key].error)

    @property
    def exceeded(self) -> int:
        """Number of heads that erred too much, over all calls."""
        return sum(one.exceeded for one in self.calls.values())

    def to_dict(self) -> dict[str, Any]:
        if not self.calls:
            return {}
        layer, step = self.largest
        return {
            "mean_error": self.mean,
            "largest_error": self.calls[layer, step].error,
            "largest_at": {"layer": layer, "step": step},
            "exceeded": self.exceeded,
            "over_expected": self.over_expected,
        }

    @property
    def over_expected(self) -> float | None:
        """Largest error over what was expected; None without a profile."""
        ratios = [one.error / one.expected for one in self.calls.values() if one.expected]
        return max(ratios, default=None)

    def __str__(self) -> str:
        if not self.calls:
            return "watch: no sparse call was seen"
        layer, step = self.largest
        line = (
            f"watch: attention error {self.mean:.3f} on average, at most "
            f"{self.calls[layer, step].error:.3f} ({layer} at step {step})"
        )
        if self.over_expected is not None:
            line += f", at most {self.over_expected:.2f} times the profile's"
        if self.exceeded:
            line += f"; heads ran denser after {self.exceeded} that erred over {LIMIT:g} times"
        return line


class Watch:
    """Watch of an attachment.

    Args:
        ladder: what to expect, and what is denser; None only reports.
        rows: queries of each head that are computed exactly.
    """

    def __init__(self, ladder: Ladder | None = None, rows: int = ROWS) -> None:
        self.ladder, self.rows = ladder, rows
        self._seen: dict[tuple[str, int], Seen] = {}
        self._calls: dict[tuple[str, int], Watched] = {}
        self._up: dict[str, dict[int, int]] = {}  # rungs up, by layer and head
        self._made: dict[Any, Any] = {}

    def begins(self, *, anew: bool) -> None:
        """Read what was seen before a step, which waits for the device.

        Args:
            anew: a new generation begins, so that earlier ones are forgotten.
        """
        if anew:
            self._seen, self._calls, self._up = {}, {}, {}
            return
        self._read()

    def looks(self, layer: str, step: int) -> bool:
        """Whether a call is to be compared: the first one of a layer in a step."""
        return (layer, step) not in self._seen and (layer, step) not in self._calls

    @torch.no_grad()
    def look(
        self,
        name: str,
        number: int,
        step: int,
        method: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        *,
        scale: float,
        first: int = 0,
    ) -> None:
        """Compute some rows of the last sample exactly, and keep their errors.

        Args:
            q, k, v, out: (B, H, N, D).
        """
        N = q.shape[2]
        g = torch.Generator().manual_seed(step * 10_007 + number)
        rows = torch.randint(N, (min(self.rows, N),), generator=g).to(q.device)
        exact = F.scaled_dot_product_attention(q[-1:, :, rows], k[-1:], v[-1:], scale=scale)
        error = (out[-1:, :, rows] - exact).float().square().mean((0, 2, 3))
        squares = exact.float().square().mean((0, 2, 3))
        self._seen[name, step] = Seen(error, squares, number, method, first)

    def method(self, name: str, number: int, step: int, method: Any, heads: int) -> Any:
        """Method of a layer at a step: the given one, with heads that erred too much denser."""
        up = self._up.get(name)
        if self.ladder is None or not up:
            return method
        key = name, step, method, tuple(sorted(up.items()))
        if key not in self._made:
            self._made[key] = self._denser(number, step, method, heads, up)
        return self._made[key]

    def seen(self) -> Watching:
        """Return the errors of the last generation. Waits for the device."""
        self._read()
        return Watching(dict(self._calls))

    def _denser(
        self, number: int, step: int, method: Any, heads: int, up: Mapping[int, int]
    ) -> Any:
        assert self.ladder is not None
        some = []
        for head in range(heads):
            one = head_method(method, head)
            for _ in range(up.get(head, 0)):
                one = self.ladder.denser(step, number, head, one)
            some.append(Some(one, (head,)))
        kinds = {one.method for one in some}
        return kinds.pop() if len(kinds) == 1 else MixedHeads(tuple(some))

    def _read(self) -> None:
        for (name, step), seen in self._seen.items():
            errors, squares = torch.stack([seen.errors, seen.squares]).double().cpu()
            whole = (errors.sum() / squares.sum().clamp_min(1e-30)).sqrt().item()
            expected, exceeded = self._compare(name, step, seen, errors, squares)
            self._calls[name, step] = Watched(whole, expected, exceeded)
        self._seen = {}

    def _compare(
        self, name: str, step: int, seen: Seen, errors: Tensor, squares: Tensor
    ) -> tuple[float | None, int]:
        """Compare each head with what is expected of it, and take it a rung up where it errs too
        much. Returns the expected error of the layer, and how many heads erred too much."""
        if self.ladder is None:
            return None, 0
        total, exceeded = 0.0, 0
        for i, (error, square) in enumerate(zip(errors.tolist(), squares.tolist(), strict=True)):
            head = seen.first + i
            known = self.ladder.expected(step, seen.layer, head, head_method(seen.method, head))
            if known is None:
                return None, exceeded
            total += known**2 * square
            if error > (LIMIT * known) ** 2 * square and error > 1e-8 * square:
                exceeded += 1
                rungs = self._up.setdefault(name, {})
                rungs[head] = rungs.get(head, 0) + 1
        return (total / max(sum(squares.tolist()), 1e-30)) ** 0.5, exceeded
