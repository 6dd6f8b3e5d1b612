"""Estimates of one run at other numbers of frames: from where on it pays."""

from typing import Any

import numpy as np

from gen_accel.measure.estimate import Estimate, estimate
from gen_accel.measure.subject import Subject, subject_of

POINTS = 10  # lengths, besides the one asked for


def over_lengths(source: Any, known: Estimate) -> list[Estimate]:
    """Estimate the run of `known` at other lengths, from short ones to twice its own.

    Args:
        source: the model, as `estimate` takes it.
        known: an estimate of that model, whose method, size, schedule, steps and efficiency hold
            for all.

    Returns:
        Estimates by rising length, `known` among them. Lengths that are too short for the method
        are left out.
    """
    subject = subject_of(source)
    found = []
    for frames in lengths(subject, known):
        if frames == known.num_frames:
            found.append(known)
            continue
        try:
            found.append(
                estimate(
                    subject,
                    known.method,
                    height=known.height,
                    width=known.width,
                    num_frames=frames,
                    schedule=known.schedule,
                    steps=known.steps,
                    efficiency=known.efficiency,
                )
            )
        except ValueError:
            continue  # a window that is longer than so short a clip
    return found


def lengths(subject: Subject, known: Estimate) -> list[int]:
    """List lengths in frames that a model can make, evenly from one token to twice `known`'s."""
    own = subject.grid(known.height, known.width, known.num_frames).frames
    tokens = {round(x) for x in np.linspace(1, 2 * own, POINTS)} - {own}
    return sorted({known.num_frames, *map(subject.frames, tokens)})
