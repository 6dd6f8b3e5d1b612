"""The screens of the page, in the order of their tabs."""

from collections.abc import Callable
from typing import NamedTuple

from gen_accel.ui import compare, generate, longer, measure, train
from gen_accel.ui.page import Page


class Screen(NamedTuple):
    """A tab.

    Args:
        name: its title.
        build: makes its components, inside the tab.
    """

    name: str
    build: Callable[[Page], None]


SCREENS = (
    Screen("Generate", generate.build),
    Screen("Compare", compare.build),
    Screen("Longer", longer.build),
    Screen("Train", train.build),
    Screen("Measure & doctor", measure.build),
)
