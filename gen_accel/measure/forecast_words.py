"""A forecast as lines for a terminal."""

import textwrap
from collections.abc import Iterator

from gen_accel.measure.cards import Range
from gen_accel.measure.estimate import WORTH
from gen_accel.measure.forecast import Forecast
from gen_accel.names import OFFLOADS

WIDTH = 80  # characters


def forecast_lines(found: Forecast, width: int = WIDTH) -> list[str]:
    """Say what a run will cost, in lines of at most `width` characters."""
    paragraphs = [*_run(found), "", *_time(found), "", *_memory(found), *_notes(found)]
    lines: list[str] = []
    for text in paragraphs:
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(
            text,
            width,
            drop_whitespace=True,
            subsequent_indent=indent or "  ",
            break_long_words=True,
            break_on_hyphens=False,
        ) or [""]
    return lines


def span(one: Range, unit: str = " s") -> str:
    """Write a range as 41-66 s."""
    low, high = number(one.low), number(one.high)
    return f"{low}{unit}" if low == high else f"{low}-{high}{unit}"


def number(value: float) -> str:
    """Write a figure with three digits at most, large ones with commas."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def fitting(found: Forecast) -> str:
    """Say whether the run fits, and what to turn on if it does not."""
    memory, peaks = found.rates.memory, found.peaks
    if memory is None:
        return f"peak: {_bytes(peaks[found.offload])} on the device"
    place = gigabytes(memory).replace(".0 ", " ")
    own = _bytes(peaks[found.offload])
    with_own = "" if found.offload == "none" else f" with --offload {found.offload}"
    if found.fits:
        return f"fits into {place}: {own}{with_own}"
    others = OFFLOADS[OFFLOADS.index(found.offload) + 1 :]
    tried = []
    for mode in others:
        fits = peaks[mode].high <= memory
        tried.append(f"with --offload {mode} {_bytes(peaks[mode])}{', which fits' * fits}")
        if fits:
            break
    said = f"does not fit into {place}: {own}{with_own}"
    if tried:
        said += "; " + "; ".join(tried)
    if found.remedy is None:
        said += "; ask for fewer frames or pixels"
    return said


def _run(found: Forecast) -> Iterator[str]:
    known = found.estimate
    yield (
        f"{known.model}, {known.num_frames} frames of {known.height} x {known.width}: "
        f"{known.video} = {known.tokens} tokens"
    )
    yield f"{known.method}, {known.schedule}, {known.steps} steps"
    yield (
        f"density {known.density:.3f} (sparsity {1 - known.density:.3f}), "
        f"{known.computed_density:.3f} computed with padding; {known.sparse_share:.0%} of the "
        "layers and steps are sparse"
    )
    times = found.calls * found.batch / 2  # the estimate counts two samples
    yield (
        f"FLOPs a step: {times * known.step_flops:.3g} dense, {known.attention_share:.0%} of it "
        "self-attention"
    )


def _time(found: Forecast) -> Iterator[str]:
    known, steps = found.estimate, found.estimate.steps
    guided = "with guidance" if found.calls * found.batch > 1 else "one call a step"
    yield f"Time on {found.rates.device}, {_dtype(found)}, {guided}:"
    rows = [
        ("", "dense", "sparse"),
        ("one step", span(found.dense), span(found.sparse)),
        (f"{steps} steps", *(_all_steps(one, steps) for one in (found.dense, found.sparse))),
    ]
    for name, one in (("text encoder", found.encoding), ("decoding", found.decoding)):
        rows.append((name, *(["not known"] if one is None else [span(one)]) * 2))
    rows.append(("in all", *(duration(found.total(s)) for s in (found.dense, found.sparse))))
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
        size = f"{gigabytes(part.size):>12}   {_count(part.parameters)} parameters"
        yield f"  {part.name:<22}{size}"
    yield f"  {'a dense step':<22}{_bytes(found.activations):>12}   activations"
    yield f"  {'a sparse step':<22}{_bytes(found.sparse_activations):>12}"
    decoded = "not known" if found.decoded is None else gigabytes(found.decoded)
    yield f"  {'decoding':<22}{decoded:>12}"
    peaks = ", ".join(f"{mode} {_bytes(peak)}" for mode, peak in found.peaks.items())
    yield f"at most, by --offload: {peaks}"
    yield fitting(found)


def _notes(found: Forecast) -> Iterator[str]:
    known = found.estimate
    yield ""
    yield f"Seconds: {found.rates.origin}."
    if found.rates.card:
        shares = {
            "products": found.rates.products,
            "convolutions": found.rates.convolutions,
            "attention": found.rates.attention,
            "memory": found.rates.moved,
        }
        for kind, one in shares.items():
            unit = "TB/s" if kind == "memory" else "TFLOPS"
            yield f"  {kind} at {one.low / 1e12:.3g}-{one.high / 1e12:.3g} {unit}: {one.source}"
    yield f"Kernel efficiency: {found.sparse.source}"
    if found.rates.on_cpu:
        yield "These are figures of the CPU. For a graphics card: --gpu h100, 4090, ..."
    if found.offload != "none":
        yield "Not in the seconds: the copying of weights by --offload."
    for what in (*known.uncounted, *found.unknown):
        yield f"not counted: {what}"


def _count(parameters: int) -> str:
    if parameters >= 1e8:
        return f"{parameters / 1e9:.3g} billion"
    return f"{parameters / 1e6:.3g} million"


def _dtype(found: Forecast) -> str:
    return str(found.dtype).removeprefix("torch.")


def _all_steps(one: Range, steps: int) -> str:
    return duration(Range(one.low * steps, one.high * steps, one.source))


def duration(one: Range) -> str:
    """Write seconds, in minutes or hours where these are many; below 0.01 s no more than that."""
    if one.high < 0.01:
        return "below 0.01 s"
    if one.low >= 2 * 3600:
        return span(Range(one.low / 3600, one.high / 3600, one.source), " h")
    if one.low >= 120:
        return span(Range(one.low / 60, one.high / 60, one.source), " min")
    return span(one)


def _bytes(one: Range) -> str:
    if one.low == one.high:
        return gigabytes(one.high)
    return f"{one.low / 1e9:.1f}-{one.high / 1e9:.1f} GB"
