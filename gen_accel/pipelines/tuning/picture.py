"""A picture of what was tuned: settings by layer, head and step, and the frontier."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gen_accel.io import replacing
from gen_accel.paths import check_output, expanded
from gen_accel.pipelines.tuning import solving
from gen_accel.pipelines.tuning.solving import Point
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gen_accel.pipelines.tuning.tuned import Tuned

# Of each family at full density; sparser settings are lighter.
COLOURS = {
    "Piecewise": (11, 107, 93),
    "Radial": (190, 82, 32),
    "Neighborhood": (58, 92, 172),
    "BlockMixture": (122, 62, 138),
    "SparseLinear": (148, 118, 20),
    "Dense": (58, 58, 62),
}
OTHER = (110, 110, 118)
LIGHTEST = 0.25  # share of the colour in the sparsest setting


def settings_picture(found: "Tuned", path: str | Path) -> Path:
    """Write a PNG: on the left the setting of each layer and head at each step, on the right the
    frontier. Raises ValueError or OSError for a path that is no .png, or cannot be written."""
    path = expanded(path)
    check_output(path, ".png")
    with needed_for("a picture of what was tuned", extra="quality"):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 6.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    image, names = cells(found)
    left.imshow(image, aspect="auto", interpolation="nearest")
    heads = found.profile.errors.shape[3]
    layers = found.profile.layers.tolist()
    left.set_yticks(
        [heads * i + (heads - 1) / 2 for i in range(len(layers))], [str(one) for one in layers]
    )
    for i in range(1, len(layers)):
        left.axhline(heads * i - 0.5, color="white", linewidth=1.5)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("step")
    left.set_ylabel("layer, a row for each head" if heads > 1 else "layer")
    patches = [
        Patch(color="#{:02x}{:02x}{:02x}".format(*COLOURS.get(name, OTHER)), label=name)
        for name in names
    ]
    figure.legend(handles=patches, ncols=len(patches), frameon=False, loc="outside lower left")
    left.set_title("Setting: colour by method, lighter is sparser", fontsize=11)
    _draw_frontier(right, found)
    preset = found.preset
    figure.suptitle(
        f"density {preset.density:.3f}, attention {preset.cost:.2f} of dense, "
        f"{preset.method.steps} steps" + ("" if preset.verified else ", not verified"),
        fontsize=12,
    )
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def cells(found: "Tuned") -> tuple[np.ndarray, list[str]]:
    """Colours of all heads, (L H, S, 3) uint8, and the names of the methods among them."""
    kinds = [type(one).__name__ for one in found.candidates]
    densities = found.profile.densities.double().mean(0).tolist()
    colours = []
    for one, kind, density in zip(found.candidates, kinds, densities, strict=True):
        share = 1.0 if one.is_dense else LIGHTEST + (1 - LIGHTEST) * min(density / 0.6, 1)
        colour = np.array(COLOURS.get(kind, OTHER))
        colours.append((share * colour + (1 - share) * 255).round())
    settings = found.point.settings.permute(1, 2, 0).flatten(0, 1).numpy()
    names = [name for name in dict.fromkeys(kinds) if name in {kinds[i] for i in settings.flat}]
    return np.array(colours)[settings].astype(np.uint8), names


def hand_settings(found: "Tuned", dense_steps: Sequence[int] = (0, 1, 2, 3, 4)) -> list[Point]:
    """Predicted figures of every candidate in all layers, after so many dense steps."""
    dense = len(found.candidates) - 1
    return [
        solving.uniform(found.profile, candidate, first, dense)
        for candidate in range(dense)
        for first in dense_steps
        if first < found.profile.steps
    ]


def _draw_frontier(axes: "Axes", found: "Tuned") -> None:
    by_density = found.options.cost == "density"

    def place(point: Point) -> float:
        return point.density if by_density else point.cost

    hand = hand_settings(found)
    axes.scatter(
        [place(p) for p in hand],
        [p.predicted for p in hand],
        s=12,
        color="#9c9ca6",
        label="one setting everywhere, some dense steps first",
    )
    rising = [point for point in found.points if point.predicted > 1e-6]
    axes.plot(
        [place(p) for p in rising],
        [p.predicted for p in rising],
        "-o",
        markersize=3.5,
        color="#0b6b5d",
        label="tuned",
    )
    axes.plot(
        place(found.point),
        max(found.point.predicted, 1e-6),
        "*",
        markersize=14,
        color="#eb5e28",
        label="the preset",
    )
    axes.set_yscale("log")
    axes.set_xlabel("share of token pairs" if by_density else "attention seconds over dense")
    axes.set_ylabel("predicted error of the final latents")
    axes.set_title("Frontier", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
