"""Seconds and memory of a run, before it: from the configs of a pipeline's parts alone.

    seconds = FLOPs of products / rate + FLOPs of attention / rate + bytes moved / bandwidth
    memory  = weights on the device + the most that a stage keeps beside them

FLOPs, bytes and activations are those of one forward pass that is traced on the meta device
(`trace`). Rates are ranges: shares of a card's data sheet (`cards`), or measured here (`rates`).
A family whose forward pass cannot be made from sizes alone gets its FLOPs from its layers, and a
wide range of activations.

The stages are the text encoders, the denoising and the decoding. Without offloading, all weights
lie on the device. `model` has one part there at a time, `sequential` one layer, `group` two, as
the next is fetched meanwhile.

Not counted: LoRAs, image prompts and techniques for longer video; scratch memory of operators,
such as cuDNN's for convolutions; activations of text encoders; the time of loading and, with
offloading, of copying weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gen_accel.attention_processors.families import FAMILIES, family_named
from gen_accel.measure.cards import Range, card_named, share_of_peak
from gen_accel.measure.estimate import OWN_ATTENTION, Estimate, estimate
from gen_accel.measure.parts import Part, cast, parts_of_pipeline
from gen_accel.measure.rates import Rates, rates_here, rates_of_card
from gen_accel.measure.subject import Subject, subject_of
from gen_accel.measure.trace import Work, traced
from gen_accel.method import Method
from gen_accel.names import OFFLOADS, check_loading
from gen_accel.video import VideoShape

# Activations of the families that can be traced, in tensors of one value for each token and
# channel; of the others, the bounds are taken.
LEAST_WIDTHS, MOST_WIDTHS = 11.0, 19.0
COPIES = 4  # q, k, v and the output in the order of a sparse kernel's tiles, beside the model's
FEW, MORE = 5, 8  # latent frames that decoding is traced at, to tell the cost of three more
ONE_BY_ONE = 3  # the same where latent frames are decoded one by one, to tell the cost of one more
MOST_TRACED = 64  # traces of autoencoders that a process remembers

_TRACED: dict[tuple[Any, ...], Work | None] = {}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds and bytes to expect. `to_dict()` for a report; `lines()` for a terminal.

    Args:
        estimate: of the same run, with its FLOPs and densities.
        rates: of the device.
        dtype: of weights and activations.
        calls: of the transformer in a step, and `batch` the samples in each of them: guidance
            doubles one of the two.
        parts: of the pipeline, with their weights.
        unknown: in words, parts whose size is not known.
        dense, sparse: seconds of one step, with every layer dense, and as the method has it on
            average over all steps.
        encoding, decoding: seconds of the text encoders and of the autoencoder; None where they
            are not known.
        activations, sparse_activations, decoded: bytes beside the weights, at most, in a dense
            step, in a sparse step and in decoding; None for decoding where it is not known.
        peaks: bytes on the device by offload mode, at most.
        offload: the mode that was asked for.
        speedup: of the denoising.
    """

    estimate: Estimate
    rates: Rates
    dtype: torch.dtype
    calls: int
    batch: int
    parts: tuple[Part, ...]
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

    @property
    def fits(self) -> bool | None:
        """Whether the peak of the mode asked for fits the device; None where that is unknown."""
        memory = self.rates.memory
        return None if memory is None else self.peaks[self.offload].high <= memory

    @property
    def remedy(self) -> str | None:
        """The first mode of offloading, in the order of their cost, that fits; None for none."""
        memory = self.rates.memory
        modes = OFFLOADS[OFFLOADS.index(self.offload) :]
        return next((m for m in modes if memory and self.peaks[m].high <= memory), None)

    def total(self, step: Range) -> Range:
        """Seconds of a whole run, all known stages together."""
        steps = self.estimate.steps
        others = [one for one in (self.encoding, self.decoding) if one is not None]
        low = steps * step.low + sum(one.low for one in others)
        return Range(low, steps * step.high + sum(one.high for one in others), step.source)

    def to_dict(self) -> dict[str, Any]:
        steps = self.estimate.steps

        def of(one: Range | None, times: float = 1) -> Any:
            return None if one is None else [one.low * times, one.high * times]

        rates = {
            kind: {
                "range": of(getattr(self.rates, kind)),
                "source": getattr(self.rates, kind).source,
            }
            for kind in ("products", "convolutions", "attention", "moved")
        }
        return self.estimate.to_dict() | {
            "device": self.rates.device,
            "device_bytes": self.rates.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rates": rates,
            "rates_from": self.rates.origin,
            "calls_per_step": self.calls,
            "samples_per_call": self.batch,
            "seconds": {
                "dense_step": of(self.dense),
                "sparse_step": of(self.sparse),
                "dense_denoising": of(self.dense, steps),
                "sparse_denoising": of(self.sparse, steps),
                "text_encoders": of(self.encoding),
                "decoding": of(self.decoding),
                "dense_total": of(self.total(self.dense)),
                "sparse_total": of(self.total(self.sparse)),
            },
            "speedup_range": of(self.speedup),
            "parts": [
                {
                    "name": part.name,
                    "class": part.kind,
                    "parameters": part.parameters,
                    "bytes": part.size,
                }
                for part in self.parts
            ],
            "unknown_parts": [*self.unknown],
            "activation_bytes": {
                "dense_step": of(self.activations),
                "sparse_step": of(self.sparse_activations),
                "decoding": self.decoded,
            },
            "peak_bytes": {mode: of(peak) for mode, peak in self.peaks.items()},
            "offload": self.offload,
            "fits": self.fits,
            "fits_with": self.remedy,
        }


def forecast(
    source: Any,
    method: Method,
    *,
    gpu: str | None = None,
    dtype: str = "auto",
    guidance: bool | None = None,
    offload: str = "none",
    text: int | None = None,
    efficiency: float | None = None,
    remeasure: bool = False,
    **run: Any,
) -> Forecast:
    """Forecast seconds and memory of a run, without loading the model.

    Args:
        source: a model, as `gen_accel.estimate` takes it.
        gpu: a card of `cards`; None: the device of this machine, whose rates are measured in
            seconds the first time.
        dtype: float32, bfloat16 or float16; "auto" is float32 on a CPU and bfloat16 elsewhere.
        guidance: whether the negative prompt runs too; None: where the model's own pipelines run
            it, which is wherever guidance is not distilled.
        offload: what waits in CPU memory: none, model, group or sequential.
        efficiency: achieved share of the ideal speed-up; None: for a card a published range, here
            measured.
        remeasure: measure again what the cache folder knows.
        run: height, width, num_frames, schedule and steps, as for `gen_accel.estimate`.

    Raises:
        ValueError: a card that is not in the table, or what `gen_accel.estimate` refuses.
    """
    card = None if gpu is None else card_named(gpu)
    check_loading(dtype, offload)
    subject = subject_of(source, text)
    own = torch.bfloat16 if card is not None else subject.dtype
    chosen = own if dtype == "auto" else getattr(torch, dtype)
    assumed = None
    if card is not None and efficiency is None:
        assumed = share_of_peak("efficiency")
    known = estimate(
        subject,
        method,
        efficiency=math.sqrt(assumed.low * assumed.high) if assumed else efficiency,
        remeasure=remeasure,
        **run,
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
    return _forecast(known, subject, source, rates, chosen, guidance, offload, assumed)


def _forecast(
    estimate: Estimate,
    subject: Subject,
    source: Any,
    rates: Rates,
    dtype: torch.dtype,
    guidance: bool | None,
    offload: str,
    reached: Range,
) -> Forecast:
    """
    Args:
        estimate, subject: of `source`.
        reached: efficiency of the sparse kernel.
    """
    calls, batch = calls_of(subject, guidance)
    parts, unknown = parts_of_pipeline(source, subject, dtype)
    grid = subject.grid(estimate.height, estimate.width, estimate.num_frames)
    work = step_work(subject, grid, batch)
    flops = subject.flops(grid)
    own = batch * flops.attention  # of the attention that the method thins out
    if work is None:
        work = Work(batch * flops.rest, own, _moved(subject, grid, batch, dtype), 0)
    saved = [
        own * estimate.sparse_share * _saved(estimate, share)
        for share in (reached.low, reached.high)
    ]
    dense = _times(calls, _seconds(work, rates))
    low, high = (_seconds(_without(work, one), rates) for one in reversed(saved))
    sparse = _times(calls, Range(low.low, high.high, reached.source))
    gains = [gain for one in saved for gain in _gains(work, one, rates)]
    activations, sparse_activations = _activations(subject, grid, work, batch, dtype, estimate)
    vae = next((part for part in parts if part.name == "vae"), None)
    decode = None if vae is None else decoding(vae, subject, grid, dtype)
    held = _peaks(parts, activations, sparse_activations, decode)
    return Forecast(
        estimate=estimate,
        rates=rates,
        dtype=dtype,
        calls=calls,
        batch=batch,
        parts=tuple(parts),
        unknown=tuple(unknown),
        dense=dense,
        sparse=sparse,
        encoding=_encoding(parts, subject, calls * batch, rates),
        decoding=None if decode is None else _seconds(decode, rates, products="convolutions"),
        activations=activations,
        sparse_activations=sparse_activations,
        decoded=None if decode is None else decode.peak,
        peaks=held,
        offload=offload,
        speedup=Range(min(gains), max(gains), reached.source),
    )


def calls_of(subject: Subject, guidance: bool | None) -> tuple[int, int]:
    """Number of calls of the transformer in a step, and of samples in each."""
    config: Any = subject.model.config
    if guidance is None:
        guidance = not config.get("guidance_embeds", False)
    if not guidance:
        return 1, 1
    return (2, 1) if subject.family.GUIDANCE == "sequential" else (1, 2)


def step_work(subject: Subject, grid: VideoShape, batch: int) -> Work | None:
    """Trace one call of the transformer; None where its family cannot make the arguments.

    Equal blocks cost the same, so that of each list of blocks one and two are traced.
    """
    make, model = subject.family.inputs, subject.model
    if make is None:
        return None
    given = make(model, grid, subject.text or 0, batch)
    lists = {
        name: blocks
        for name, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 2 and are_alike(blocks)
    }

    def at(**lengths: int) -> Work:
        try:
            for name, blocks in lists.items():
                setattr(model, name, blocks[: lengths.get(name, 1)])
            return traced(lambda: model(**given, return_dict=False))
        finally:
            for name, blocks in lists.items():
                setattr(model, name, blocks)

    try:
        whole = least = at()
        for name, blocks in lists.items():
            more = at(**{name: 2})
            whole = _sum(whole, least, more, len(blocks) - 1)
    except Exception:  # a class of the family that takes more than these arguments
        return None
    return whole


def are_alike(blocks: nn.ModuleList) -> bool:
    first = [(name, value.shape) for name, value in blocks[0].named_parameters()]
    return all(
        [(name, value.shape) for name, value in block.named_parameters()] == first
        for block in blocks
    )


def _sum(whole: Work, least: Work, more: Work, times: float) -> Work:
    """Add what `more` does beyond `least`, so many times; memory is the most of them."""
    added = {
        name: getattr(whole, name) + times * (getattr(more, name) - getattr(least, name))
        for name in ("products", "attention", "moved")
    }
    most = {
        name: max(getattr(whole, name), getattr(more, name))
        for name in ("peak", "at_attention", "longest")
    }
    return Work(**added, **most)


def _saved(estimate: Estimate, efficiency: float) -> float:
    """Share of the attention of a sparse layer that is not computed; below 0 where it is slower
    than dense attention."""
    if estimate.efficiency_from == OWN_ATTENTION:
        return 0.0
    return 1 - estimate.computed_density / efficiency


def _without(work: Work, saved: float) -> Work:
    return replace(work, attention=max(work.attention - saved, 0.0))


def _seconds(work: Work, rates: Rates, products: str = "products") -> Range:
    """
    Args:
        products: the rate of products, "convolutions" where they are these.
    """
    rate: Range = getattr(rates, products)

    def at(side: str) -> float:
        return (
            work.products / getattr(rate, side)
            + work.attention / getattr(rates.attention, side)
            + work.moved / getattr(rates.moved, side)
        )

    return Range(at("high"), at("low"), rates.origin)


def _times(count: float, one: Range) -> Range:
    return Range(count * one.low, count * one.high, one.source)


def _gains(work: Work, saved: float, rates: Rates) -> list[float]:
    """Speed-up at both ends of the rates, which are the same for dense and sparse steps."""
    dense, sparse = _seconds(work, rates), _seconds(_without(work, saved), rates)
    return [dense.low / sparse.low, dense.high / sparse.high]


def _moved(subject: Subject, grid: VideoShape, batch: int, dtype: torch.dtype) -> float:
    """Bytes that all but products move, where nothing was traced: as in the traced families, some
    forty tensors of all tokens a layer."""
    width = max(site.heads * site.dim for site in subject.sites)
    return 40.0 * batch * len(subject.sites) * grid.video_tokens * width * dtype.itemsize


def _activations(
    subject: Subject,
    grid: VideoShape,
    work: Work,
    batch: int,
    dtype: torch.dtype,
    estimate: Estimate,
) -> tuple[Range, Range]:
    """Bytes of a dense and of a sparse step at most."""
    width = max(site.heads * site.dim for site in subject.sites)
    tokens = batch * subject.whole(grid).tokens * width * dtype.itemsize
    kept = 0 if estimate.memory is None else estimate.memory.device
    if work.peak:
        dense = Range(work.peak, work.peak, "traced")
        sparse = max(work.peak, work.at_attention + COPIES * tokens) + kept
        return dense, Range(sparse, sparse, "traced")
    dense = Range(
        LEAST_WIDTHS * tokens, MOST_WIDTHS * tokens, "as in the families that are traced"
    )
    return dense, replace(dense, low=dense.low + kept, high=dense.high + COPIES * tokens + kept)


def decoding(vae: Part, subject: Subject, grid: VideoShape, dtype: torch.dtype) -> Work | None:
    """Trace the decoding as `pipelines.generation.decode` does it: in parts where the family can,
    else as a whole."""
    return _once(_decoding, vae, subject, grid, dtype)


def encoding(vae: Part, subject: Subject, grid: VideoShape, dtype: torch.dtype) -> Work | None:
    """Trace the encoding of a clip as a whole, as caching does it; None where that is unknown."""
    return _once(_encoding_of, vae, subject, grid, dtype)


def _once(
    trace: Callable[..., Work | None],
    vae: Part,
    subject: Subject,
    grid: VideoShape,
    dtype: torch.dtype,
) -> Work | None:
    """Trace an autoencoder, once in a process at each size: it takes most of a forecast."""
    model: Any = vae.model
    if model is None:
        return None
    cast(model, dtype)
    if subject.family.TILED_VAE:
        model.enable_tiling()
    sides = tuple(n * p for n, p in zip(grid.grid, subject.patch, strict=True))
    scales = subject.patch, subject.spatial, subject.temporal
    key = (trace, type(model), repr(model.config), subject.family, *scales, sides, dtype)
    if key not in _TRACED:
        while len(_TRACED) >= MOST_TRACED:
            _TRACED.pop(next(iter(_TRACED)))
        _TRACED[key] = trace(model, subject, sides, dtype)
    return _TRACED[key]


def _decoding(
    model: Any, subject: Subject, sides: Sequence[int], dtype: torch.dtype
) -> Work | None:
    parts = _parts_of(model, subject.family)
    one_by_one = parts is not None and type(model).__name__ == "AutoencoderKLWan"
    frames, rows, columns = sides
    config = model.config
    channels = config.get("z_dim") or config.get("latent_channels")

    def at(length: int) -> Work:
        z = torch.zeros(1, channels, length, rows, columns, dtype=dtype, device="meta")
        if parts is None:
            return traced(lambda: model.decode(z, return_dict=False))
        decode: Any = parts
        return traced(lambda: _drained(decode(model, z)))

    few, more = (ONE_BY_ONE, ONE_BY_ONE + 1) if one_by_one else (FEW, MORE)
    try:
        if frames <= more:
            return at(frames)
        short, longer = at(few), at(more)
    except Exception:  # an autoencoder that takes more than latents
        return None
    times = (frames - few) / (more - few)
    peak = short.peak + times * (longer.peak - short.peak)  # grows where it is decoded whole
    return replace(_sum(short, short, longer, times), peak=round(max(peak, short.peak)))


def _encoding_of(
    model: Any, subject: Subject, sides: Sequence[int], dtype: torch.dtype
) -> Work | None:
    frames, rows, columns = sides
    height, width = subject.spatial * rows, subject.spatial * columns

    def at(length: int) -> Work:
        count = subject.frames(-(-length // subject.patch[0]))
        x = torch.zeros(1, 3, count, height, width, dtype=dtype, device="meta")
        return traced(lambda: model.encode(x, return_dict=False))

    try:
        if frames <= MORE:
            return at(frames)
        short, longer = at(FEW), at(MORE)
    except Exception:  # an autoencoder that takes more than a video
        return None
    times = (frames - FEW) / (MORE - FEW)
    return replace(longer, peak=round(short.peak + times * (longer.peak - short.peak)))


def _parts_of(vae: Any, family: Any) -> Any:
    """Return how an autoencoder decodes in parts, by its own family or another one that has it;
    None where it decodes as a whole."""
    kind = type(vae).__name__
    if kind != family.AUTOENCODER:
        return None
    for one in (family, *map(family_named, FAMILIES)):
        if kind == one.AUTOENCODER and one.decode_parts is not None:
            return one.decode_parts(vae)
    return None


def _drained(parts: Any) -> None:
    for _ in parts:
        pass


def _encoding(parts: list[Part], subject: Subject, prompts: int, rates: Rates) -> Range | None:
    """Seconds of the text encoders: products of their weights with all tokens of the prompts."""
    encoders = [part for part in parts if part.is_encoder]
    if not encoders or not subject.text:
        return None
    flops = sum(2.0 * (part.parameters - part.embedding) for part in encoders)
    moved = prompts * sum(part.size for part in encoders)
    return _seconds(Work(flops * subject.text * prompts, 0, moved, 0), rates)


def _peaks(
    parts: list[Part], dense: Range, sparse: Range, decode: Work | None
) -> dict[str, Range]:
    """Bytes on the device at most, by mode of offloading."""
    decoded = 0 if decode is None else decode.peak
    step = Range(max(dense.low, sparse.low), max(dense.high, sparse.high), sparse.source)

    def beside(part: Part) -> Range:
        if part.name.startswith(("transformer", "unet")):
            return step
        return Range(decoded, decoded, "traced") if part.name == "vae" else Range(0, 0, "")

    whole = sum(part.size for part in parts)
    held = {
        "none": lambda part: whole,
        "model": lambda part: part.size,
        "group": lambda part: min(2 * part.largest, part.size),
        "sequential": lambda part: part.largest,
    }
    return {
        mode: Range(
            max(weights(part) + beside(part).low for part in parts),
            max(weights(part) + beside(part).high for part in parts),
            step.source,
        )
        for mode, weights in held.items()
    }
