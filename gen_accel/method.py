"""Method: what to compute. The base class of all methods, each part with its default."""

from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.memory import check_room, plan_cached
from gen_accel.parsing import shown
from gen_accel.plan import Plan
from gen_accel.registry import check_subclass, check_takes
from gen_accel.video import VideoShape

Box = tuple[int, int, int]  # frames, rows, columns
# Runs a plan on q, k and v, at the scale of the model: a `gen_accel.kernels.Runner`, whose `name`
# the user asked for.
RunPlan = Callable[[Tensor, Tensor, Tensor, Plan], Tensor]
# Lower bounds in bytes. Of a plan: the place of a token, to and fro, and a pair of blocks. Of
# smooth q and k: a token, with the waves and the noise that make it.
PLACE, MOST_BLOCK, QK = 8, 256, 5 * 64 * 4


class Step(NamedTuple):
    """A denoising step of a run.

    Args:
        number: from 0, whatever the schedule keeps dense.
        total: how many there are; None: unknown.
        progress: from 0 at the first sparse step to 1 at the last; 0 if `total` is unknown.
    """

    number: int = 0
    total: int | None = None
    progress: float = 0.0


class StepState:
    """State of a method from one denoising step of a run to the next, empty when made.

    The owner is whoever runs the model, such as attached attention: one for each layer and each
    call in a step, since guidance makes two calls. At dense steps `learn` receives the output of
    dense attention; at the steps that follow, the method's call receives the state as `state=`. A
    call that needs a gradient gets none. The state is dropped at a new run, at another grid,
    batch, dtype or device, after an exception in the model, and when the method is detached.

    Attributes:
        every: steps after which to learn again; 0: never in the same run.
        refuses_training: why no gradient can do without the state; "": one can.
        for_less: advice for a state that is too large, as the end of an error.
    """

    every: int = 0
    refuses_training: str = ""
    for_less: str = ""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        check_subclass(cls, StepState, "state")

    def learn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Tensor,
        *,
        video: VideoShape,
        kernel: RunPlan,
        first: "StepState | None",
    ) -> None:
        """Store what the following steps need.

        Args:
            q, k, v: (B, H, N, D), as for the call of the method.
            dense: (B, H, N, D), output of dense attention.
            first: state of the first call of this step; None in that call itself.
        """
        raise NotImplementedError(f"{type(self).__name__} learns nothing")

    def size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Bytes on the model's device after `learn` on q of shape (B, H, N, D), without anything
        as small as a plan."""
        return 0

    def host_size(self, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Bytes in the memory of the host, if the device has its own; arguments as in `size`."""
        return 0


class Method:
    """Base class of methods, which say what to compute: usually a frozen dataclass of options.

        @dataclass(frozen=True)
        class Sliding(gen_accel.Method):
            reach: int = 4

            def plan(self, video, device): ...

    `plan` is enough to run everywhere. A class is checked when it is made: a public name that
    looks like a misspelt part is refused, and so is a part that takes other arguments.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        check_subclass(cls, Method, "method")
        known = {"branch": "branch", "gate": "gate", "step_state": "state"}
        own = [part for part in known if getattr(cls, part) is not getattr(Method, part)]
        if len(own) > 1:
            raise ValueError(
                f"{cls.__name__} must have one of {', '.join(known)}, got {' and '.join(own)}"
            )
        extra = [known[part] for part in own]
        check_takes(cls, "__call__", "q", "k", "v", **dict.fromkeys(["video", "kernel", *extra]))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> Tensor:
        """Compute attention over the pairs that the method keeps, by default by its `plan`.

        Args:
            q, k, v: (B, H, N, D), N == video.tokens, video first, text last.
            kernel: a method that computes by itself need not call it; such a method runs in eager
                mode and is refused inside `torch.compile`.

        Returns:
            (B, H, N, D) in q's dtype.
        """
        return kernel(q, k, v, self.plan(video, q.device))

    # What is kept

    def plan(self, video: VideoShape, device: torch.device) -> Plan:
        """Make the pattern on a grid. For a pattern that depends on q and k, the plan for smooth
        random ones, for pictures and estimates."""
        raise ValueError(f"{type(self).__name__} has no plan(video, device)")

    def plan_for(
        self,
        q: Tensor,
        k: Tensor,
        *,
        video: VideoShape,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> Plan:
        """Make the pattern for q and k, (B, H, N, D), without a gradient and without waiting for
        the device.

        Args:
            scale: factor of q k^T, by default 1 / sqrt(D).
            kernel: name of the kernel, on which the choice of blocks may depend.
        """
        return self.plan(video, q.device)

    def density(self, video: VideoShape) -> float:
        """Share of token pairs that are kept, in [0, 1]; 1 - density is the sparsity."""
        return self.planned(video).density

    @property
    def is_dense(self) -> bool:
        """Whether the method stands for the model's own attention, which then runs."""
        return False

    @property
    def is_dynamic(self) -> bool:
        """Whether the pattern depends on q and k."""
        return self.defines("plan_for")

    @property
    def thins_by_time(self) -> bool:
        """Whether all pairs of a single frame are kept."""
        return False

    @property
    def least_grid(self) -> Box:
        """Smallest grid that can be planned."""
        return 1, 1, 1

    # Where it runs

    def for_layer(self, layer: int) -> "Method":
        """Return the method of one layer, counted from 0."""
        return self

    def at(self, step: Step) -> "Method":
        """Return the method at one step."""
        return self

    @property
    def changes_by(self) -> Literal["", "progress", "number"]:
        """Fact of a step that `at` depends on; "": none."""
        return "progress" if self.defines("at") else ""

    def for_heads(self, heads: slice) -> "Method":
        """Return the method of a process that holds this slice of a layer's heads. Only a method
        that knows heads by number has this part."""
        return self

    @property
    def needs_all_heads(self) -> str:
        """Reason why a process that holds some of the heads cannot run it; "": it can."""
        return ""

    def together(self, methods: Sequence[Any]) -> "Method | None":
        """Return one method that gives each head its own of `methods`, one a head, all of this
        class; None if it cannot. Their blocks are then chosen at once."""
        return None

    def for_device(self, device: torch.device) -> "Method":
        """Return the method with device-dependent options filled in, as saved to files."""
        return self

    def within(self, video: VideoShape, whole: VideoShape) -> "Method":
        """Return the method for a layer whose grid, `video`, is smaller than the model's."""
        return self

    @property
    def tile_tokens(self) -> int:
        """Fewest tokens of the box that `gen_accel.calibrate` may choose, up to twice as many; 0:
        the method has no such box, or it is given."""
        return 0

    def tiled(self, tile: Box | tuple[Box, ...]) -> "Method":
        """Return the method with blocks of this box, or of a box for each layer."""
        return self

    @property
    def named_layers(self) -> tuple[int, ...]:
        """Layers that the options name, counted from 0; a model without them is refused."""
        return ()

    def unfit(self, model: str, layer: int, heads: int) -> str:
        """Say why a layer of so many heads, in a transformer of that class, cannot run it; "": it
        can."""
        return ""

    # What is offered

    @classmethod
    def candidates(
        cls, video: VideoShape, *, tile: Any = None, profile: str = ""
    ) -> Sequence["Method"]:
        """Settings from sparse to dense, of which `gen_accel.tune` takes the ones that fit a grid.

        Args:
            tile: box of each layer, as `calibrate` finds it; None: unknown.
            profile: sha256 of masses that dense runs of the model showed; "": unknown.
        """
        return ()

    @classmethod
    def keeping(cls, share: float, video: VideoShape) -> "Method | None":
        """Return the method that keeps about this share of the token pairs or key blocks on a
        grid; None if no option says how much is kept. ComfyUI's node offers methods that do."""
        return None

    # What it holds

    def branch(self, heads: int, dim: int) -> nn.Module | None:
        """Make the initial parameters of one layer. The call then takes `branch=`. A branch may
        have `silent() -> bool`: see `is_silent`."""
        return None

    def gate(self, heads: int, dim: int, width: int) -> nn.Module | None:
        """Make the initial gate of one layer, from the hidden states that q, k and v are projected
        from, (B, N, width), to (B, N, heads * dim). The call then takes `gate=`, (B, H, N, D), and
        runs without one too. A gate may have `silent() -> bool`: see `is_silent`."""
        return None

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, *, video: VideoShape, kernel: RunPlan
    ) -> tuple[Tensor, Tensor]:
        """Compute O_s and O_l, (B, H, N, D) each, that a branch combines, for `calibrate`."""
        raise ValueError(f"{type(self).__name__} has no parts that a branch combines")

    def step_state(self) -> StepState | None:
        """Make an empty state, kept from step to step. The call then takes `state=`, and runs
        without one too."""
        return None

    # Not to be overridden

    def planned(self, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        """Make `plan`; ValueError for a grid whose plan cannot fit in memory."""
        tokens = video.tokens
        size = 2 * PLACE * tokens + (tokens // MOST_BLOCK) ** 2
        size += QK * tokens if self.is_dynamic else 0
        what = f"a plan of {type(self).__name__} for {video} = {tokens} tokens"
        check_room(what, size, "ask for fewer tokens")
        return self.plan(video, torch.device(device))

    def parameters_of(self, heads: int, dim: int, width: int) -> nn.Module | None:
        """Make the initial parameters of one layer, a branch or a gate; None without any."""
        return self.branch(heads, dim) or self.gate(heads, dim, width)

    @property
    def has_parameters(self) -> bool:
        """Whether it has a branch or a gate in each layer."""
        return self.defines("branch") or self.defines("gate")

    def defines(self, part: str) -> bool:
        """Whether it has a part of its own in place of the default, such as "branch"."""
        return getattr(type(self), part) is not getattr(Method, part)


def plan_once(make: Callable[[Any, VideoShape, torch.device], Plan]) -> Callable[..., Plan]:
    """Make the part `plan` of a method remember its plans by method, grid and device, as far as
    memory allows.

    A plan is built outside of inference mode, so that one made while sampling serves training too.
    """
    known = plan_cached(torch.inference_mode(False)(make))

    @wraps(make)
    def plan(self: object, video: VideoShape, device: torch.device | str = "cpu") -> Plan:
        return known(self, video, torch.device(device))

    return plan


def check_method(method: object) -> None:
    """Raise ValueError, in one line, for anything but an instance of `Method` that is hashable."""
    if not isinstance(method, Method):
        hint = ""
        if isinstance(method, nn.Module):
            hint = ", a module: its parameters belong in branch(heads, dim)"
        elif callable(method) and not isinstance(method, type):
            hint = ": derive its class from gen_accel.Method"
        shown = type(method).__name__ if hint else repr(method)
        raise ValueError(f"method must be an instance such as Radial(), got {shown}{hint}")
    if torch.compiler.is_compiling():
        return
    try:
        hash(method)
    except TypeError as error:
        raise ValueError(
            f"{type(method).__name__} must be hashable, as an instance of a frozen dataclass is: "
            f"{error}"
        ) from None


def check_grid(method: Method, video: VideoShape) -> None:
    """Raise ValueError, with the plan's own message, if the method does not fit the grid."""
    small = any(least > size for least, size in zip(method.least_grid, video.grid, strict=True))
    if small and method.defines("plan"):
        method.planned(video)


def check_class(kind: object, name: str) -> None:
    """Raise ValueError for anything but a class of methods, called `name`."""
    if not isinstance(kind, type) or not issubclass(kind, Method):
        raise ValueError(
            f"method {name!r} must be a class derived from gen_accel.Method, got {shown(kind)}"
        )


def check_named(option: str, named: Collection[int], blocks: Collection[int]) -> None:
    """Raise ValueError if an option names a block that is not in `blocks`."""
    unknown = sorted({*named} - {*blocks})
    if unknown:
        raise ValueError(
            f"{option} must name blocks that attend over the grid, {min(blocks)} to "
            f"{max(blocks)} here, got {', '.join(map(str, unknown))}"
        )


def is_silent(branch: nn.Module) -> bool:
    """Whether a branch reports by `silent()` that it adds nothing. Synchronises the device."""
    said = getattr(branch, "silent", None)
    return said is not None and bool(said())
