"""A method on a live model: the handle, its layers, clock, schedule and record."""
