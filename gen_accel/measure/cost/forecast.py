"""Seconds and memory of a run, before it: from the configs of a pipeline's components alone.

    seconds = FLOPs of products / rate + FLOPs of attention / rate + bytes moved / bandwidth
    memory  = weights on the device + the most that a stage keeps beside them

FLOPs, bytes and activations are those of one forward pass that is traced on the meta device
(`work`). Rates are ranges: shares of a card's data sheet, or measured here (`rates`). A family
whose forward pass cannot be made from sizes alone gets its FLOPs from its layers, and a wide range
of activations.

The stages are the text encoders, the denoising and the decoding. Without offloading, all weights
lie on the device. `model` has one component there at a time, `sequential` one layer, `group` two,
as the next is fetched meanwhile.

Not counted: LoRAs, image prompts and techniques for longer video; scratch memory of operators,
such as cuDNN's for convolutions; activations of text encoders; the time of loading and, with
offloading, of copying weights.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families.base import Pass
from gen_accel.measure.cost.estimate import (
    OWN_ATTENTION,
    WORTH,
    Estimate,
    estimate,
    step_flops,
)
from gen_accel.measure.cost.figures import (
    WIDTH,
    Range,
    card_named,
    duration,
    gigabytes,
    share_of_peak,
    span,
    wrapped,
)
from gen_accel.measure.cost.model import ComponentSize, Source, Subject, components_of, subject_of
from gen_accel.measure.cost.rates import KINDS, Rates, rates_here, rates_of_card
from gen_accel.measure.cost.work import Work, decoding, step_work
from gen_accel.method import Method
from gen_accel.registry import LEAST_TOKENS, OFFLOADS, QUANTISERS, check_loading, too_small

# Activations of the families that can be traced, in tensors of one value for each token and
# channel; for the others, the bounds are taken.
LEAST_WIDTHS, MOST_WIDTHS = 11.0, 19.0
STEP = 0.01  # seconds of a step below which no figure is given: to start its kernels takes as long
COPIES = 4  # q, k, v and the output in the order of a sparse kernel's tiles, beside the model's
TENSORS = 40.0  # moved in a layer by all but products, of all tokens, as in the traced families


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds and bytes to expect. `to_dict()` for a report, `lines()` for people.

    Args:
        estimate: of the same run, with its FLOPs and densities.
        rates: of the device.
        dtype: of weights and activations.
        calls: of the transformer in a step, and `batch` the samples in each of them: guidance
            doubles one of the two.
        parts: the components of the pipeline, with their weights.
        unknown: in words, components of unknown size.
        dense, sparse: seconds of one step, with every layer dense, and as the method has it on
            average over all steps.
        encoding, decoding: seconds of the text encoders and of the autoencoder; None if unknown.
        activations, sparse_activations, decoded: bytes beside the weights, at most, in a dense
            step, in a sparse step and in decoding; None for decoding if it is unknown.
        peaks: bytes on the device by offload mode, at most.
        offload: the mode that was asked for.
        quantize: how the linear layers of the transformers' blocks are held; None: in `dtype`.
        speedup: of the denoising.
        fps: frames a second of the clip, which cost nothing; None if not known.
        to_fetch: bytes that the run fetches from the hub first; None for a model that is here, and
            where the hub does not say.
    """

    estimate: Estimate
    rates: Rates
    dtype: torch.dtype
    calls: int
    batch: int
    parts: tuple[ComponentSize, ...]
    unknown: tuple[str, ...]
    dense: Range
    sparse: Range
    encoding: Range | None
    decoding: Range | None
    activations: Range
    sparse_activations: Range
    decoded: int | None
    peaks: Mapping[str, Range]
    offload: str
    speedup: Range
    fps: float | None = None
    quantize: str | None = None
    to_fetch: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the peak of the mode asked for fits the device; None if that is unknown."""
        memory = self.rates.memory
        return None if memory is None else self.peaks[self.offload].high <= memory

    @property
    def remedy(self) -> str | None:
        """The first mode of offloading, in the order of their cost, that fits; None for none."""
        memory = self.rates.memory
        modes = self._modes[self._modes.index(self.offload) :]
        return next((m for m in modes if memory and self.peaks[m].high <= memory), None)

    @property
    def _modes(self) -> tuple[str, ...]:
        """Modes of offloading that go with the weights, in the order of their cost."""
        return OFFLOADS[:2] if self.quantize in QUANTISERS else OFFLOADS

    def total(self, step: Range) -> Range:
        """Seconds of a whole run, all known stages together."""
        stages = [step.times(self.estimate.steps), self.encoding, self.decoding]
        known = [one for one in stages if one is not None]
        return Range(sum(one.low for one in known), sum(one.high for one in known), step.source)

    def to_dict(self) -> dict[str, object]:
        def pair(one: Range | None, factor: float = 1) -> list[float] | None:
            return None if one is None else one.pair(factor)

        steps = self.estimate.steps
        rates = {kind: getattr(self.rates, kind) for kind in KINDS}
        return self.estimate.to_dict() | {
            "fps": self.fps,
            "device": self.rates.device,
            "device_bytes": self.rates.memory,
            "dtype": self._dtype,
            "rates": {
                kind: {"range": rate.pair(), "source": rate.source} for kind, rate in rates.items()
            },
            "rates_from": self.rates.origin,
            "calls_per_step": self.calls,
            "samples_per_call": self.batch,
            "seconds": {
                "dense_step": pair(self.dense),
                "sparse_step": pair(self.sparse),
                "dense_denoising": pair(self.dense, steps),
                "sparse_denoising": pair(self.sparse, steps),
                "text_encoders": pair(self.encoding),
                "decoding": pair(self.decoding),
                "dense_total": pair(self.total(self.dense)),
                "sparse_total": pair(self.total(self.sparse)),
            },
            "speedup_range": self.speedup.pair(),
            "parts": [
                {"name": p.name, "class": p.kind, "parameters": p.parameters, "bytes": p.size}
                for p in self.parts
            ],
            "unknown_parts": [*self.unknown],
            "activation_bytes": {
                "dense_step": self.activations.pair(),
                "sparse_step": self.sparse_activations.pair(),
                "decoding": self.decoded,
            },
            "peak_bytes": {mode: peak.pair() for mode, peak in self.peaks.items()},
            "offload": self.offload,
            "quantize": self.quantize,
            "fetch_bytes": self.to_fetch,
            "fits": self.fits,
            "fits_with": self.remedy,
        }

    def lines(self, width: int = WIDTH) -> list[str]:
        """Lines for a terminal, of at most `width` characters."""
        parts = (self._run(), self._seconds(), self._memory(), self._notes())
        return wrapped([line for part in parts for line in ("", *part)][1:], width)

    def fitting(self) -> str:
        """Say whether the run fits, and what to turn on if it does not."""
        memory, own = self.rates.memory, _bytes(self.peaks[self.offload])
        if memory is None:
            return f"peak: {own} on the device"
        place = gigabytes(memory).replace(".0 ", " ")
        with_own = "" if self.offload == "none" else f" with --offload {self.offload}"
        if self.fits:
            return f"fits into {place}: {own}{with_own}"
        said = [f"does not fit into {place}: {own}{with_own}"]
        for mode in self._modes[self._modes.index(self.offload) + 1 :]:
            fits = self.peaks[mode].high <= memory
            said.append(f"with --offload {mode} {_bytes(self.peaks[mode])}{', which fits' * fits}")
            if fits:
                return "; ".join(said)
        return "; ".join([*said, "ask for fewer frames or pixels"])

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _run(self) -> Iterator[str]:
        known = self.estimate
        yield from known.head(f"; {known.sparse_share:.0%} of the layers and steps are sparse")
        times = self.calls * self.batch / known.calls
        yield (
            f"FLOPs a step: {times * known.step_flops:.3g} dense, {known.attention_share:.0%} of "
            "it self-attention"
        )

    def _seconds(self) -> Iterator[str]:
        known, steps, both = self.estimate, self.estimate.steps, (self.dense, self.sparse)
        guided = "with guidance" if self.calls * self.batch > 1 else "one call a step"
        yield f"Time on {self.rates.device}, {self._dtype}, {guided}:"
        encoding, decoding = (
            "not known" if one is None else duration(one) for one in (self.encoding, self.decoding)
        )
        for name, dense, sparse in (
            ("", "dense", "sparse"),
            ("one step", *(duration(one, STEP) for one in both)),
            (f"{steps} steps", *(duration(one.times(steps)) for one in both)),
            ("text encoder", encoding, encoding),
            ("decoding", decoding, decoding),
            ("in all", *(duration(self.total(one)) for one in both)),
        ):
            yield f"  {name:<14}{dense:>24}{sparse:>24}"
        yield (
            "predicted speed-up of the denoising beside the model's own dense attention: "
            f"{span(self.speedup, 'x')}; free attention "
            f"would give {known.limit:.2f}x"
        )
        if known.tokens < LEAST_TOKENS:
            yield too_small(known.tokens, steps)
        elif self.speedup.high < WORTH:
            yield f"do not bother: less than {WORTH}x is not worth a changed result"
        elif self.speedup.low < WORTH:
            yield f"it may not pay off: below {WORTH}x, a changed result is not worth it"
        else:
            yield f"pays off ({WORTH}x or more)"
        longer = known.pays_from is not None and known.pays_from > known.num_frames
        if longer or (known.pays and self.speedup.high >= WORTH and known.tokens >= LEAST_TOKENS):
            yield f"pays off from {known.pays_from} frames at this size"

    def _memory(self) -> Iterator[str]:
        held = "" if self.quantize is None else f", of the blocks in {self.quantize}"
        yield f"Memory, weights in {self._dtype}{held}:"
        for part in self.parts:
            count, unit = part.parameters / 1e6, "million"
            if part.parameters >= 1e8:
                count, unit = part.parameters / 1e9, "billion"
            yield f"  {part.name:<22}{gigabytes(part.size):>12}   {count:.3g} {unit} parameters"
        yield f"  {'a dense step':<22}{_bytes(self.activations):>12}   activations"
        yield f"  {'a sparse step':<22}{_bytes(self.sparse_activations):>12}"
        decoded = "not known" if self.decoded is None else gigabytes(self.decoded)
        yield f"  {'decoding':<22}{decoded:>12}"
        peaks = ", ".join(f"{mode} {_bytes(self.peaks[mode])}" for mode in self._modes)
        yield f"at most, by --offload: {peaks}"
        yield self.fitting()
        if self.to_fetch:
            yield f"to be fetched from the hub first: {gigabytes(self.to_fetch)}"

    def _notes(self) -> Iterator[str]:
        rates = self.rates
        yield f"Seconds: {rates.origin}."
        if rates.card:
            for kind in ("products", "convolutions", "attention", "moved"):
                one: Range = getattr(rates, kind)
                kind, unit = ("memory", "TB/s") if kind == "moved" else (kind, "TFLOPS")
                at = f"{one.low / 1e12:.3g}-{one.high / 1e12:.3g} {unit}"
                yield f"  {kind} at {at}: {one.source}"
        yield f"Kernel efficiency: {self.sparse.source}"
        if rates.on_cpu:
            yield "These are figures of the CPU. For a graphics card: --gpu h100, 4090, ..."
        if self.offload != "none":
            yield "Not in the seconds: the copying of weights by --offload."
        yield from (f"not counted: {what}" for what in (*self.estimate.uncounted, *self.unknown))


def _bytes(one: Range) -> str:
    if one.low == one.high:
        return gigabytes(one.high)
    return f"{one.low / 1e9:.1f}-{one.high / 1e9:.1f} GB"


def curve_lines(points: Iterable[Estimate]) -> Iterator[str]:
    """Tabulate other numbers of frames, with the speed-up that FLOPs alone give."""
    yield f"{'frames':>8}{'tokens':>10}{'density':>10}{'by FLOPs':>11}"
    for one in points:
        yield f"{one.num_frames:>8}{one.tokens:>10}{one.density:>10.3f}{one.speedup:>10.2f}x"


def forecast(
    source: Source,
    method: Method,
    *,
    height: int,
    width: int,
    num_frames: int,
    schedule: Schedule | None = None,
    steps: int = 50,
    gpu: str | None = None,
    dtype: str = "auto",
    guidance_scale: float | None = None,
    offload: str = "none",
    quantize: str | None = None,
    text: int | None = None,
    efficiency: float | None = None,
    remeasure: bool = False,
) -> Forecast:
    """Forecast seconds and memory of a run, without loading the model.

    Args:
        source: a model, as `gen_accel.estimate` takes it, and with it the sizes, the schedule, the
            steps and `text`.
        gpu: name of a card; None: the device of this machine, whose rates are measured in seconds
            the first time.
        dtype: float32, bfloat16 or float16; "auto" is float32 on a CPU and bfloat16 elsewhere.
        guidance_scale: of classifier-free guidance, for which the negative prompt runs too above
            1; None: as in the model's own pipelines, which run it unless guidance is distilled.
        offload: what waits in CPU memory: none, model, group or sequential.
        quantize: how the linear layers of the transformers' blocks are held: fp8, int8 or nf4.
        efficiency: achieved share of the ideal speed-up; None: for a card a published range, here
            measured.
        remeasure: measure again what the cache folder knows.

    Raises:
        ValueError: an unknown card, or what `gen_accel.estimate` refuses.
    """
    card = None if gpu is None else card_named(gpu)
    check_loading(dtype, offload, quantize)
    subject = subject_of(source, text)
    chosen = torch.bfloat16 if card is not None else subject.dtype
    chosen = chosen if dtype == "auto" else getattr(torch, dtype)
    assumed = share_of_peak("efficiency") if card is not None and efficiency is None else None
    known = estimate(
        subject,
        method,
        height=height,
        width=width,
        num_frames=num_frames,
        schedule=schedule,
        steps=steps,
        efficiency=math.sqrt(assumed.low * assumed.high) if assumed else efficiency,
        remeasure=remeasure,
    )
    if card is not None:
        rates = rates_of_card(card)
    else:
        rates = rates_here(subject.device, chosen, subject.head_dim, again=remeasure)
    if assumed is None:
        reached = known.efficiency
        assumed = Range(reached, reached, f"{reached:.2f}, {known.efficiency_from}")
    else:
        assumed = replace(assumed, source=f"{assumed.low:g}-{assumed.high:g}, {assumed.source}")

    calls, batch = calls_of(subject, guidance_scale)
    parts, unknown = components_of(source, subject, chosen, quantize)
    grid = subject.grid(height, width, num_frames)
    passes = subject.passes(grid, steps)
    flops, _ = step_flops(subject, passes, steps)
    work = _step(subject, passes, steps, batch, chosen)
    thin = work
    if known.efficiency_from != OWN_ATTENTION:
        own_attention = batch * flops.attention * known.sparse_share
        thin = replace(
            work,
            attention=work.attention - own_attention,
            sparse=own_attention * known.computed_density,
        )
    gains = [  # at both ends of the rates, which are the same for dense and sparse steps
        rates.at(side, work) / rates.at(side, thin, reached)
        for reached in (assumed.low, assumed.high)
        for side in ("low", "high")
    ]

    # Bytes of a dense and of a sparse step at most.
    held = max(_held(subject, one) for one in passes)
    tokens = batch * held * subject.width * chosen.itemsize
    kept = 0 if known.memory is None else known.memory.device
    wide = sum(site.heads * site.dim for site in subject.sites)
    cached = 2 * batch * max(one.cached for one in passes) * wide * chosen.itemsize
    if work.peak:
        most = max(work.peak, work.at_attention + COPIES * tokens) + kept
        dense, sparse = Range(work.peak, work.peak, "traced"), Range(most, most, "traced")
    else:
        source_of = "as in the families that are traced"
        low, high = (cached + widths * tokens for widths in (LEAST_WIDTHS, MOST_WIDTHS))
        dense = Range(low, high, source_of)
        sparse = replace(dense, low=dense.low + kept, high=dense.high + COPIES * tokens + kept)

    # Products of the text encoders' weights with all tokens of the prompts.
    encoding, prompts = None, calls * batch
    encoders = [part for part in parts if part.is_encoder]
    if encoders and subject.text:
        products = sum(2.0 * (part.parameters - part.embedding) for part in encoders)
        moved = prompts * sum(part.size for part in encoders)
        encoding = rates.seconds(Work(products * subject.text * prompts, 0, moved))
    vae = next((part for part in parts if part.name == "vae"), None)
    decode = None if vae is None else decoding(vae, subject, grid, chosen)
    return Forecast(
        estimate=known,
        rates=rates,
        dtype=chosen,
        calls=calls,
        batch=batch,
        parts=tuple(parts),
        unknown=tuple(unknown),
        dense=rates.seconds(work).times(calls),
        sparse=rates.seconds(thin, assumed).times(calls),
        encoding=encoding,
        decoding=None if decode is None else rates.seconds(decode, products="convolutions"),
        activations=dense,
        sparse_activations=sparse,
        decoded=None if decode is None else decode.peak,
        peaks=_peaks(parts, dense, sparse, 0 if decode is None else decode.peak),
        offload=offload,
        quantize=quantize,
        speedup=Range(min(gains), max(gains), assumed.source),
    )


def _step(
    subject: Subject, passes: Sequence[Pass], steps: int, batch: int, dtype: torch.dtype
) -> Work:
    """The work of a dense step: that of its passes together, and the memory of the largest."""
    step = none = Work(0, 0, 0)
    for one in passes:
        work = None if one.lengths else step_work(subject, one.video, batch)
        if work is None:
            flops = subject.flops(one.video, one.lengths)
            values = batch * _held(subject, one) * subject.width
            moved = TENSORS * len(subject.sites) * values * dtype.itemsize
            work = Work(batch * flops.rest, batch * flops.attention, moved)
        step = step.extended(none, work, one.times / steps)
    return step


def _held(subject: Subject, one: Pass) -> float:
    """Tokens that pass the blocks."""
    return one.lengths.get("noisy") or subject.whole(one.video, one.lengths).tokens


def calls_of(subject: Subject, guidance_scale: float | None) -> tuple[int, int]:
    """Number of calls of the transformer in a step, and of samples in each. A model that takes the
    scale as an input is called once."""
    by_default = not subject.family.generation.distilled
    is_guided = by_default if guidance_scale is None else guidance_scale > 1
    if not is_guided or subject.config.get("guidance_embeds", False):
        return 1, 1
    return (2, 1) if subject.family.image_prompts.guidance == "sequential" else (1, 2)


def _peaks(
    parts: list[ComponentSize], dense: Range, sparse: Range, decoded: int
) -> dict[str, Range]:
    """Bytes on the device at most, by mode of offloading."""
    step = Range(max(dense.low, sparse.low), max(dense.high, sparse.high), sparse.source)
    whole = sum(part.size for part in parts)
    ends: dict[str, list[tuple[float, float]]] = {mode: [] for mode in OFFLOADS}
    for part in parts:
        low, high = (decoded, decoded) if part.name == "vae" else (0, 0)
        if part.name.startswith(("transformer", "unet")):
            low, high = step.low + part.unpacked, step.high + part.unpacked
        held = {
            "none": whole,
            "model": part.size,
            "group": min(2 * part.largest, part.size),
            "sequential": part.largest,
        }
        for mode, weights in held.items():
            ends[mode].append((weights + low, weights + high))
    return {
        mode: Range(max(low for low, _ in found), max(high for _, high in found), step.source)
        for mode, found in ends.items()
    }
