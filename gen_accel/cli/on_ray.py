"""The options --ray and --ray-workers, which verbs that work on several machines share."""

from typing import Annotated

import typer

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
