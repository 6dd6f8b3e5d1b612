"""Points of a training's curves, as a plot of the page takes them."""

STEP, VALUE, LINE = "step", "value", "line"  # columns

Point = tuple[int, float, str]  # step, value, name of the line
