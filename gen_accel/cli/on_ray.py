"""The options --ray and --ray-workers, which verbs that work on several machines share."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gen_accel.cluster import AUTO, Cluster, check_address, check_device, check_installed

NAME = "--ray"

RayAddress = Annotated[
    str | None,
    typer.Option(
        NAME,
        metavar="[ADDRESS]",
        help="Work by Ray's workers on all its machines, HOST:PORT. Without ADDRESS: the cluster "
        "of this machine, or this machine alone.",
    ),
]

RayWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes of --ray. Without: one for each GPU, or each machine without GPUs.",
    ),
]


class RayVerb(TyperCommand):
    """A verb that also takes --ray without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_address(args))


def with_address(args: list[str]) -> list[str]:
    """Write out the address of --ray where none follows."""
    found = []
    for arg, after in zip(args, [*args[1:], "-"], strict=False):  # no arguments, no rounds
        found.append(arg)
        if arg == NAME and (after.startswith("-") or after.endswith((".yaml", ".yml"))):
            found.append(AUTO)
    return found


def cluster_of(address: str | None, workers: int | None, device: str) -> Cluster | None:
    """Return the cluster of both options, checked as far as that takes no time; None without.

    Raises:
        ValueError: an address of another form, workers without Ray, or a device by its number.
        ModuleNotFoundError: Ray is missing.
    """
    if address is None:
        if workers is not None:
            raise ValueError(f"--ray-workers {workers} goes with --ray")
        return None
    check_address(address)
    check_device(device)
    check_installed()
    return Cluster(address, workers)


def on_cluster(
    run: Callable[..., list[Any]], cluster: Cluster, unmade: list[ValueError]
) -> Callable[..., list[Any]]:
    """Return the library's `generate` on a cluster, which returns what could be made.

    Args:
        unmade: takes the error of what could not, to be raised once the rest is printed.
    """

    def made(*args: Any, **options: Any) -> list[Any]:
        from gen_accel.pipelines.generation.on_ray import Unmade

        try:
            return run(*args, cluster=cluster, **options)
        except Unmade as error:
            unmade.append(error)
            return error.made

    return made
