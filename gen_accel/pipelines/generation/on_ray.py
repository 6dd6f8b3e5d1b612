"""Videos of a list of prompts by workers of Ray, on one machine or on many."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gen_accel.cluster import Cluster, Done, Machines, connected
from gen_accel.hub import parted
from gen_accel.measure.report import comparison_files
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.model_index import folder_of
from gen_accel.pipelines.generation.plan import GenerationPlan, Video
from gen_accel.pipelines.generation.preview import preview_of
from gen_accel.pipelines.generation.progress import Progress
from gen_accel.pipelines.generation.prompt_list import record_of


class Unmade(ValueError):
    """Error for videos that could not be made, beside others that were.

    Args:
        made: results of the others, in the order of the prompts.
        failed: reason of each, by the name of its file.
    """

    def __init__(self, made: Sequence[Any], failed: dict[str, str]) -> None:
        whole = len(made) + len(failed)
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        super().__init__(
            f"{len(failed)} of {whole} videos could not be made, and the same command tries them "
            f"again: {told}"
        )
        self.made, self.failed = [*made], failed


def spread(
    cluster: Cluster,
    plan: GenerationPlan,
    left: Sequence[int],
    load: Callable[[], Callable[[int], Any]],
) -> list[Any]:
    """Make videos of a plan by workers of Ray.

    Args:
        left: numbers of the videos to make.
        load: loads the pipeline in a worker, once; returns what makes a video by its number.

    Returns the results in the order of the prompts.

    Raises:
        ValueError: a cluster that `connected` refuses, a machine that does not see what it needs,
            or a pipeline that a worker cannot load, which ends the run.
        Unmade: some videos could not be made.
    """
    print("connecting to Ray ...", file=sys.stderr, flush=True)
    with connected(cluster, plan.config.device) as machines:
        print(machines, file=sys.stderr, flush=True)
        return _spread(machines, plan, left, load)


def _spread(
    machines: Machines,
    plan: GenerationPlan,
    left: Sequence[int],
    load: Callable[[], Callable[[int], Any]],
) -> list[Any]:
    made: dict[int, Any] = {}
    failed: dict[int, str] = {}
    clears = [_written(plan, plan.videos[number]) for number in left]
    told = set[str]()
    found = machines.map(load, [*left], reads=_sources(plan), clears=clears)
    with Progress() as bar:
        task = bar.add_task("waiting for the first", total=len(left), unit="videos")
        try:
            for done in found:
                number = left[done.number]
                if done.loads:
                    raise ValueError(f"machine {done.host}: {done.failed}")
                for line in [line for line in dict.fromkeys(done.told) if line not in told]:
                    warnings.warn(line, stacklevel=2)
                told |= {*done.told}
                if done.failed is None:
                    made[number] = done.result
                else:
                    failed[number] = done.failed
                count = len(made) + len(failed)
                words = _words(done, plan.videos[number])
                bar.update(task, completed=count, description=words, at_once=True)
        finally:
            found.close()
    results = [made[number] for number in sorted(made)]
    if failed:
        raise Unmade(results, {plan.videos[i].target.name: failed[i] for i in sorted(failed)})
    return results


def _words(done: Done, video: Video) -> str:
    words = f"{video.target.name} by {done.host}"
    if done.died:
        words += f", after a worker died on {' and '.join(dict.fromkeys(done.died))}"
    return words if done.failed is None else f"{words} failed"


def _written(plan: GenerationPlan, video: Video) -> list[Path]:
    """Files that may be half written where a worker of Ray ended."""
    files = [video.target, record_of(video.target)]
    files += [] if video.latents is None else [video.latents]
    files += [*comparison_files(video.target)] if plan.config.compare else []
    files += [] if plan.config.preview is None else [Path(preview_of(video.target))]
    return [path.absolute() for path in files]


def _sources(plan: GenerationPlan) -> list[Path]:
    """Files and folders here that the workers read too; pictures and presets go to them."""
    named = [
        folder_of(plan.config.model),
        *(expanded(parted(lora)[0]) for lora in plan.config.loras),
    ]
    if plan.config.from_lora is not None:
        named.append(expanded(plan.config.from_lora))
    if plan.images is not None:
        sources = (plan.images.adapter, plan.images.encoder)
        named += [expanded(source) for source in sources if source is not None]
    return [path for path in named if path.exists()]
