"""The settings that are tried for each head of each layer at each step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gen_accel.attention_processors import METHODS, Dense, method_name
from gen_accel.attention_processors.methods.profiled import Masses
from gen_accel.attention_processors.methods.registry import method_of_file, saved_options
from gen_accel.io import fields_of, typed
from gen_accel.method import Box, Method, check_method
from gen_accel.parsing import shown
from gen_accel.video import VideoShape

Tile = Box | tuple[Box, ...] | None  # of all layers, or of each; None: "auto"


def default_candidates(
    video: VideoShape,
    *,
    tile: Tile = None,
    families: Sequence[str] = tuple(METHODS),
    masses: Masses | None = None,
) -> tuple[Method, ...]:
    """Candidates of each method that has some, as far as they fit the grid, and `Dense()`.

    Args:
        tile: box of each layer, as `gen_accel.calibrate` finds it; None: "auto".
        families: names of methods.
        masses: what dense runs of the model showed, for `Profiled`; None: it is left out.
    """
    unknown = sorted({*families} - {*METHODS})
    if unknown:
        raise ValueError(
            f"families must be of {tuple(METHODS)}, got {', '.join(map(repr, unknown))}"
        )
    known = {"tile": tile, "profile": "" if masses is None else masses.digest}
    # On a small grid some windows are the same.
    found = dict.fromkeys(
        one for name in families for one in METHODS[name].candidates(video, **known)
    )
    return (*(one for one in found if fits(one, video)), Dense())


def fits(method: Method, video: VideoShape) -> bool:
    """Whether a method can be planned on a grid, and leaves something out there."""
    try:
        return method.planned(video).density < 1
    except ValueError:
        return False


def checked(candidates: Sequence[Method], device: torch.device) -> tuple[Method, ...]:
    """Return candidates with `Dense()` as the last, and their options for the device.

    Raises:
        ValueError: none but `Dense()`, two that are equal, or one that no rule takes.
    """
    for one in candidates:
        check_method(one)
        if one.defines("step_state") or one.changes_by:
            raise ValueError(
                f"{one!r} cannot be a candidate: it remembers earlier steps, or changes by itself"
            )
    sparse = [one.for_device(device) for one in candidates if not one.is_dense]
    if not sparse:
        raise ValueError("candidates must hold a sparse method, got none")
    if len({*sparse}) < len(sparse):
        raise ValueError("candidates must differ from each other")
    return (*sparse, Dense())


def middle(errors: Sequence[float]) -> int:
    """Number of the candidate whose error lies in the middle of all that err."""
    order = sorted((error, i) for i, error in enumerate(errors) if error > 0)
    return order[len(order) // 2][1]


def described(method: Method) -> dict[str, object]:
    """A method as JSON holds it. The files of profiles are named without their folder."""
    options = saved_options(method)
    if file := _profile_of(options):
        options["file"] = Path(file).name
    return {"method": method_name(method), "options": options}


def _profile_of(options: Mapping[str, object]) -> str:
    """File of a profile that options name; "" for none."""
    file = options.get("file")
    return file if isinstance(file, str) and "sha256" in options else ""


def made_of(data: object, origin: str | Path, folder: Path) -> Method:
    """Make the method that `described` wrote; ValueError for anything else.

    Args:
        folder: where the files of profiles lie, which are named without one.
    """
    held = fields_of(data, origin)
    name = typed(held, "method", str, origin=origin)
    options = {**typed(held, "options", dict, origin=origin)}
    if file := _profile_of(options):
        if Path(file).name != file:
            raise ValueError(f"a profile of {origin} must lie beside it, got {shown(file)}")
        options["file"] = str(folder / file)
    try:
        return method_of_file(name, options)
    except ValueError as error:
        raise ValueError(f"{error}; if another version wrote {origin}, tune again") from error
