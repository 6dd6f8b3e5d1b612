"""Options of the backend, from the server's `--additional-config '{"gen_accel": {...}}'`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from gen_accel import Schedule
from gen_accel.attention_processors.methods.registry import method_from, with_tuples
from gen_accel.kernels import check_name

NAME = "gen_accel"  # in the server's additional_config
OF_METHOD = ("method", "settings", "kernel")
OF_SCHEDULE = tuple(one.name for one in fields(Schedule))
DEFAULT_METHOD, DEFAULT_SETTINGS = "piecewise", ("critical=0.2",)
# What vLLM-Omni itself gives a backend of this name, and what has the same meaning here.
THEIRS = {
    "sparsity": (0.8, "the method's own option in settings"),
    "start_step": (0, "dense_steps"),
    "end_step": (0, "dense, such as [-1, -2]"),
    "precision": ("bf16", 'kernel, such as "int8"'),
    "skip_layers": (None, "dense_layers"),
}


@dataclass(frozen=True)
class Options:
    """Options of all layers.

    Args:
        method: any of `gen_accel.METHODS` that keeps nothing from step to step.
        kernel: "auto" or a name that never falls back.
        schedule: layers and steps that stay dense.
    """

    method: Any
    kernel: str = "auto"
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Options":
        """Read `given`, as JSON holds it; ValueError, in one line, for what is unknown or cannot
        be kept."""
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{NAME} of additional_config must hold options, got {given!r}")
        known = (*OF_METHOD, *OF_SCHEDULE)
        for key in given:
            if key not in known:
                near = get_close_matches(str(key), known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"{NAME} has no option {key!r}; {hint}")
        values = with_tuples(given)
        kernel = values.get("kernel", "auto")
        check_name(kernel)
        method = _method(values)
        try:
            schedule = Schedule(**{k: v for k, v in values.items() if k in OF_SCHEDULE})
        except TypeError as error:
            raise ValueError(str(error)) from None
        return cls(method, kernel, schedule)


def check_theirs(given: Mapping[str, Any] | None) -> None:
    """Refuse vLLM-Omni's own controls of this name, `block_sparse`, where they are set: each has
    another name here."""
    for key, value in (given or {}).items():
        default, ours = THEIRS.get(key, (None, "an option of gen_accel"))
        if value != default:
            raise ValueError(
                f"block_sparse.{key}={value!r} is of another backend: give {ours} in "
                f"--additional-config '{{\"{NAME}\": {{...}}}}'"
            )


def _method(values: Mapping[str, Any]) -> Any:
    settings = values.get("settings")
    settings = (settings,) if isinstance(settings, str) else settings
    if settings is None:
        settings = () if "method" in values else DEFAULT_SETTINGS
    if not isinstance(settings, tuple) or not all(isinstance(one, str) for one in settings):
        raise ValueError(f'settings must be a list of "field=value", got {settings!r}')
    name = values.get("method", DEFAULT_METHOD)
    if not isinstance(name, str):
        raise ValueError(f"method must be a name, got {name!r}")
    method = method_from(name, settings)
    if method.defines("step_state"):
        raise ValueError(
            f"{name} remembers a dense step of the same clip, and clips take turns in a server: "
            "give the method that it wraps"
        )
    return method
