"""Videos of a list of prompts by workers of Ray, on one machine or on many."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from gen_accel.cluster import Cluster, Done, connected
from gen_accel.hub import parted
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.model_index import folder_of
from gen_accel.pipelines.generation.plan import GenerationPlan
from gen_accel.pipelines.generation.progress import Progress
from gen_accel.pipelines.generation.prompt_list import Generated


class Unmade(ValueError):
    """Error for videos that could not be made, beside others that were.

    Args:
        made: results of the others, in the order of the prompts.
        failed: reason of each, by the name of its file.
    """

    def __init__(self, made: Sequence[Generated], failed: dict[str, str]) -> None:
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
    load: Callable[[], Callable[[int], Generated]],
) -> list[Generated]:
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
    with connected(cluster, plan.config.device) as machines:
        done: dict[int, Done] = {}
        told = set[str]()
        clears = [  # files that may be half written where a worker ended
            [path.absolute() for path in plan.files_of(plan.videos[number]).values()]
            for number in left
        ]
        work = machines.map(load, [*left], reads=_sources(plan), clears=clears)
        with Progress() as bar, closing(work):
            task = bar.add_task("waiting for the first", total=len(left), unit="videos")
            for one in work:
                if one.loads:
                    raise ValueError(f"machine {one.host}: {one.failed}")
                for line in dict.fromkeys(one.told):
                    if line not in told:
                        warnings.warn(line, stacklevel=2)
                told |= {*one.told}
                number = left[one.number]
                done[number] = one
                words = f"{plan.videos[number].target.name} by {one.host}"
                if one.died:
                    words += f", after a worker died on {' and '.join(dict.fromkeys(one.died))}"
                words += "" if one.failed is None else " failed"
                bar.update(task, completed=len(done), description=words, at_once=True)
    ended = [(plan.videos[i].target.name, done[i]) for i in sorted(done)]
    made = [one.result for _, one in ended if one.failed is None]
    if failed := {name: one.failed for name, one in ended if one.failed is not None}:
        raise Unmade(made, failed)
    return made


def _sources(plan: GenerationPlan) -> list[Path]:
    """Files and folders here that the workers read too; pictures and presets go to them."""
    loras = [parted(lora)[0] for lora in plan.config.loras]
    adapter = () if plan.images is None else (plan.images.adapter, plan.images.encoder)
    named = (folder_of(plan.config.model), *loras, plan.config.from_lora, *adapter)
    paths = [expanded(source) for source in named if source is not None]
    return [path for path in paths if path.exists()]
