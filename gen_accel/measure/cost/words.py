"""Costs as lines for a terminal: a forecast, a curve, and their figures."""

import textwrap
from collections.abc import Iterable, Iterator

from gen_accel.measure.cost.estimate import WORTH, Estimate
from gen_accel.measure.cost.figures import Range, duration, gigabytes, span
from gen_accel.measure.cost.forecast import Forecast
from gen_accel.registry import OFFLOADS

WIDTH = 80  # characters


def wrapped(paragraphs: Iterable[str], width: int = WIDTH) -> list[str]:
    """Wrap paragraphs to lines of at most `width` characters, each two further in than its first
    or as far in as a table's row."""
    lines: list[str] = []
    for text in paragraphs:
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(
            text, width, subsequent_indent=indent or "  ", break_on_hyphens=False
        ) or [""]
    return lines


def curve_lines(points: Iterable[Estimate]) -> Iterator[str]:
    """A table of other numbers of frames."""
    yield f"{'frames':>8}{'tokens':>10}{'density':>10}{'speed-up':>11}"
    for one in points:
        yield f"{one.num_frames:>8}{one.tokens:>10}{one.density:>10.3f}{one.speedup:>10.2f}x"


def forecast_lines(found: Forecast, width: int = WIDTH) -> list[str]:
    """Lines of the cost of a run, of at most `width` characters."""
    paragraphs = [*_run(found), "", *_time(found), "", *_memory(found), *_notes(found)]
    return wrapped(paragraphs, width)


def fitting(found: Forecast) -> str:
    """Say whether the run fits, and what to turn on if it does not."""
    memory, peaks = found.rates.memory, found.peaks
    own = _bytes(peaks[found.offload])
    if memory is None:
        return f"peak: {own} on the device"
    place = gigabytes(memory).replace(".0 ", " ")
    with_own = "" if found.offload == "none" else f" with --offload {found.offload}"
    if found.fits:
        return f"fits into {place}: {own}{with_own}"
    said = [f"does not fit into {place}: {own}{with_own}"]
    for mode in OFFLOADS[OFFLOADS.index(found.offload) + 1 :]:
        fits = peaks[mode].high <= memory
        said.append(f"with --offload {mode} {_bytes(peaks[mode])}{', which fits' * fits}")
        if fits:
            return "; ".join(said)
    return "; ".join([*said, "ask for fewer frames or pixels"])


def _run(found: Forecast) -> Iterator[str]:
    known = found.estimate
    yield from known.head(f"; {known.sparse_share:.0%} of the layers and steps are sparse")
    times = found.calls * found.batch / 2  # the estimate counts two samples
    yield (
        f"FLOPs a step: {times * known.step_flops:.3g} dense, {known.attention_share:.0%} of it "
        "self-attention"
    )


def _time(found: Forecast) -> Iterator[str]:
    known, steps = found.estimate, found.estimate.steps
    guided = "with guidance" if found.calls * found.batch > 1 else "one call a step"
    yield f"Time on {found.rates.device}, {_dtype(found)}, {guided}:"
    both = found.dense, found.sparse
    rows = [
        ("", "dense", "sparse"),
        ("one step", *map(span, both)),
        (f"{steps} steps", *(duration(one.times(steps)) for one in both)),
    ]
    for name, one in (("text encoder", found.encoding), ("decoding", found.decoding)):
        rows.append((name, *(["not known"] if one is None else [span(one)]) * 2))
    rows.append(("in all", *(duration(found.total(one)) for one in both)))
    yield from (f"  {name:<14}{dense:>24}{sparse:>24}" for name, dense, sparse in rows)
    yield (
        f"predicted speed-up of the denoising: {span(found.speedup, 'x')}; free attention would "
        f"give {known.limit:.2f}x"
    )
    if found.speedup.high < WORTH:
        yield f"do not bother: less than {WORTH}x is not worth a changed result"
    elif found.speedup.low < WORTH:
        yield f"it may not pay off: below {WORTH}x, a changed result is not worth it"
    else:
        yield f"pays off ({WORTH}x or more)"
    if known.pays_from is not None:
        yield f"pays off from {known.pays_from} frames at this size"


def _memory(found: Forecast) -> Iterator[str]:
    yield f"Memory, weights in {_dtype(found)}:"
    for part in found.parts:
        count, unit = part.parameters / 1e6, "million"
        if part.parameters >= 1e8:
            count, unit = part.parameters / 1e9, "billion"
        size = f"{gigabytes(part.size):>12}   {count:.3g} {unit} parameters"
        yield f"  {part.name:<22}{size}"
    yield f"  {'a dense step':<22}{_bytes(found.activations):>12}   activations"
    yield f"  {'a sparse step':<22}{_bytes(found.sparse_activations):>12}"
    decoded = "not known" if found.decoded is None else gigabytes(found.decoded)
    yield f"  {'decoding':<22}{decoded:>12}"
    peaks = ", ".join(f"{mode} {_bytes(peak)}" for mode, peak in found.peaks.items())
    yield f"at most, by --offload: {peaks}"
    yield fitting(found)


def _notes(found: Forecast) -> Iterator[str]:
    rates = found.rates
    yield ""
    yield f"Seconds: {rates.origin}."
    if rates.card:
        for kind in ("products", "convolutions", "attention", "moved"):
            one: Range = getattr(rates, kind)
            kind, unit = ("memory", "TB/s") if kind == "moved" else (kind, "TFLOPS")
            yield f"  {kind} at {one.low / 1e12:.3g}-{one.high / 1e12:.3g} {unit}: {one.source}"
    yield f"Kernel efficiency: {found.sparse.source}"
    if rates.on_cpu:
        yield "These are figures of the CPU. For a graphics card: --gpu h100, 4090, ..."
    if found.offload != "none":
        yield "Not in the seconds: the copying of weights by --offload."
    yield from (f"not counted: {what}" for what in (*found.estimate.uncounted, *found.unknown))


def _dtype(found: Forecast) -> str:
    return str(found.dtype).removeprefix("torch.")


def _bytes(one: Range) -> str:
    if one.low == one.high:
        return gigabytes(one.high)
    return f"{one.low / 1e9:.1f}-{one.high / 1e9:.1f} GB"
