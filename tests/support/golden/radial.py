"""Block masks of radial attention."""

from collections.abc import Iterator

from support.golden.deviation import Arrays, Deviation, Format, bits, by_id, wrong_blocks

from gen_accel.attention_processors import Radial
from gen_accel.video import VideoShape


def check(case: dict, arrays: Arrays) -> Iterator[Deviation]:
    """The public code's block mask, bit for bit."""
    rows, columns = case["shape"]
    seq, block = case["seq"], case["block"]
    if rows != columns or rows not in (seq // block, -(-seq // block)):
        raise ValueError(f"shape must count the blocks of {block} in {seq}, got {case['shape']}")
    want = bits(arrays[str(case["id"])], (rows, columns))

    s, text = case["tokens_per_frame"], seq - case["frames"] * case["tokens_per_frame"]
    sink = {"hunyuan": False, "wan": True}[case["model_type"]]
    method = Radial("code-2025-11", case["decay_factor"], sink, block)
    keep = method.plan(VideoShape(case["frames"], 1, s, text)).keep[0, 0]
    yield wrong_blocks(keep[:rows, :columns], want)


KEYS = {"frames", "tokens_per_frame", "seq", "decay_factor", "model_type", "block", "shape"}
FORMAT = Format("radial", frozenset(KEYS), by_id(""), check)
