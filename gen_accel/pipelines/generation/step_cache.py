"""Caches of diffusers, which skip most of a model at steps that are like the last one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from gen_accel.attention_processors.attached.clock import served_transformers
from gen_accel.attention_processors.attached.records import Summary
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.hub import silenced
from gen_accel.parsing import shown
from gen_accel.registry import split_cache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

HALF = 0.5  # share of the calls of a whole step, up to which a step counts as skipped
FEWEST = 3  # steps that TaylorSeer learns from before it predicts


@contextmanager
def caching(
    pipe: "DiffusionPipeline", cache: str | None, schedule: Schedule | None, steps: int | None
) -> Iterator[None]:
    """Skip calls of the pipeline's transformers by a cache inside, and leave them as they were.

    Steps that the schedule keeps dense at the start are computed, where the cache has a warm-up.

    Args:
        cache: NAME or NAME:NUMBER of `registry.CACHES`; None for none.
        steps: of the run.

    Raises ValueError for a model that the cache does not know.
    """
    with ExitStack() as stack:
        models = {} if cache is None else served_transformers(pipe)
        for model in models.values():
            cached = _enabled(model, str(cache), _warm_up(schedule, steps))
            stack.callback(cached.disable_cache)
        yield


def check_cache(pipe: "DiffusionPipeline", cache: str) -> None:
    """Raise ValueError for a cache that does not know a transformer of the pipeline."""
    with caching(pipe, cache, None, None):
        pass


def skipped_steps(summary: Summary) -> list[int]:
    """List the steps of a run at which a cache left out half of the layers' calls or more."""
    calls = dict.fromkeys(summary.steps, 0)
    for (_, step), record in summary.records.items():
        calls[step] = calls.get(step, 0) + record.calls
    most = max(calls.values(), default=0)
    return sorted(step for step, count in calls.items() if count <= HALF * most)


def words_of_cache(cache: str, summary: Summary) -> str:
    """Say how many steps a cache skipped."""
    skipped, steps = skipped_steps(summary), len(summary.steps)
    if skipped:
        return f"cache {cache}: {len(skipped)} of {steps} steps skipped"
    return f"cache {cache}: none of {steps} steps skipped, which another number may change"


def _warm_up(schedule: Schedule | None, steps: int | None) -> int:
    """Number of steps until the dense ones at the start end; the very first may be sparse."""
    if schedule is None or steps is None or schedule.dense_noise is not None:
        return 0
    sparse = schedule.sparse_steps(steps)
    end = next((step for step in sparse if step), steps)
    return end if end > 1 or 0 not in sparse else 0


def _enabled(model: "ModelMixin", cache: str, warm_up: int) -> Any:
    """Enable a cache on a model, and return the model."""
    import diffusers

    name, number = split_cache(cache)
    found: Any = model
    kind, version = type(model).__name__, f"diffusers {diffusers.__version__}"
    options: dict[str, Any] = {"threshold": number}
    match name:
        case "first_block":
            config = "FirstBlockCacheConfig"
        case "sea":
            config, options["retention_steps"] = "SeaCacheConfig", max(1, warm_up)
        case _:
            config, options = "TaylorSeerCacheConfig", {"cache_interval": int(number)}
            options |= {"use_lite_mode": True, "taylor_factors_dtype": model.dtype}
            options["disable_cache_before_step"] = max(FEWEST, warm_up)
    made = getattr(diffusers, config, None)
    if made is None or not hasattr(model, "enable_cache"):
        what = version if made is None else f"{kind} in {version}"
        raise ValueError(f"cache {name} is nothing that {what} has: leave cache out")
    try:
        with silenced("diffusers"):
            found.enable_cache(made(**options))
        return found
    except (AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"cache {name} does not go with {kind}: {shown(error)}; leave cache out"
        ) from error
