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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.measure.cost.cards import card_named, share_of_peak
from gen_accel.measure.cost.estimate import OWN_ATTENTION, Estimate, estimate
from gen_accel.measure.cost.figures import Range
from gen_accel.measure.cost.model import ComponentSize, Subject, components_of, subject_of
from gen_accel.measure.cost.rates import KINDS, Rates, rates_here, rates_of_card
from gen_accel.measure.cost.work import Work, decoding, step_work
from gen_accel.method import Method
from gen_accel.registry import OFFLOADS, check_loading
from gen_accel.video import VideoShape

# Activations of the families that can be traced, in tensors of one value for each token and
# channel; for the others, the bounds are taken.
LEAST_WIDTHS, MOST_WIDTHS = 11.0, 19.0
COPIES = 4  # q, k, v and the output in the order of a sparse kernel's tiles, beside the model's
TENSORS = 40.0  # moved in a layer by all but products, of all tokens, as in the traced families


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds and bytes to expect. `to_dict()` for a report, `words.forecast_lines` for people.

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
        speedup: of the denoising.
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

    @property
    def fits(self) -> bool | None:
        """Whether the peak of the mode asked for fits the device; None if that is unknown."""
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
        stages = [step.times(self.estimate.steps), self.encoding, self.decoding]
        known = [one for one in stages if one is not None]
        return Range(sum(one.low for one in known), sum(one.high for one in known), step.source)

    def to_dict(self) -> dict[str, Any]:
        steps = self.estimate.steps
        rates = {kind: getattr(self.rates, kind) for kind in KINDS}
        return self.estimate.to_dict() | {
            "device": self.rates.device,
            "device_bytes": self.rates.memory,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rates": {
                kind: {"range": rate.pair(), "source": rate.source} for kind, rate in rates.items()
            },
            "rates_from": self.rates.origin,
            "calls_per_step": self.calls,
            "samples_per_call": self.batch,
            "seconds": {
                "dense_step": self.dense.pair(),
                "sparse_step": self.sparse.pair(),
                "dense_denoising": self.dense.pair(steps),
                "sparse_denoising": self.sparse.pair(steps),
                "text_encoders": None if self.encoding is None else self.encoding.pair(),
                "decoding": None if self.decoding is None else self.decoding.pair(),
                "dense_total": self.total(self.dense).pair(),
                "sparse_total": self.total(self.sparse).pair(),
            },
            "speedup_range": self.speedup.pair(),
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
                "dense_step": self.activations.pair(),
                "sparse_step": self.sparse_activations.pair(),
                "decoding": self.decoded,
            },
            "peak_bytes": {mode: peak.pair() for mode, peak in self.peaks.items()},
            "offload": self.offload,
            "fits": self.fits,
            "fits_with": self.remedy,
        }


def forecast(
    source: Any,
    method: Method,
    *,
    height: int,
    width: int,
    num_frames: int,
    schedule: Schedule | None = None,
    steps: int = 50,
    gpu: str | None = None,
    dtype: str = "auto",
    guidance: bool | None = None,
    offload: str = "none",
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
        guidance: whether the negative prompt runs too; None: as in the model's own pipelines,
            which run it unless guidance is distilled.
        offload: what waits in CPU memory: none, model, group or sequential.
        efficiency: achieved share of the ideal speed-up; None: for a card a published range, here
            measured.
        remeasure: measure again what the cache folder knows.

    Raises:
        ValueError: an unknown card, or what `gen_accel.estimate` refuses.
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

    calls, batch = calls_of(subject, guidance)
    parts, unknown = components_of(source, subject, chosen)
    grid = subject.grid(height, width, num_frames)
    flops = subject.flops(grid)
    work = step_work(subject, grid, batch)
    if work is None:
        moved = TENSORS * batch * len(subject.sites) * grid.video_tokens
        moved *= subject.width * chosen.itemsize
        work = Work(batch * flops.rest, batch * flops.attention, moved)
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
    activations, sparse_activations = _activations(subject, grid, work, batch, chosen, known)
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
        encoding=_encoding(parts, subject, calls * batch, rates),
        decoding=None if decode is None else rates.seconds(decode, products="convolutions"),
        activations=activations,
        sparse_activations=sparse_activations,
        decoded=None if decode is None else decode.peak,
        peaks=_peaks(parts, activations, sparse_activations, decode),
        offload=offload,
        speedup=Range(min(gains), max(gains), assumed.source),
    )


def calls_of(subject: Subject, guidance: bool | None) -> tuple[int, int]:
    """Number of calls of the transformer in a step, and of samples in each."""
    config: Any = subject.model.config
    if guidance is None:
        guidance = not config.get("guidance_embeds", False)
    if not guidance:
        return 1, 1
    return (2, 1) if subject.family.image_prompts.guidance == "sequential" else (1, 2)


def _activations(
    subject: Subject,
    grid: VideoShape,
    work: Work,
    batch: int,
    dtype: torch.dtype,
    estimate: Estimate,
) -> tuple[Range, Range]:
    """Bytes of a dense and of a sparse step at most."""
    tokens = batch * subject.whole(grid).tokens * subject.width * dtype.itemsize
    kept = 0 if estimate.memory is None else estimate.memory.device
    if work.peak:
        sparse = max(work.peak, work.at_attention + COPIES * tokens) + kept
        return Range(work.peak, work.peak, "traced"), Range(sparse, sparse, "traced")
    dense = Range(
        LEAST_WIDTHS * tokens, MOST_WIDTHS * tokens, "as in the families that are traced"
    )
    return dense, replace(dense, low=dense.low + kept, high=dense.high + COPIES * tokens + kept)


def _encoding(
    parts: list[ComponentSize], subject: Subject, prompts: int, rates: Rates
) -> Range | None:
    """Seconds of the text encoders: products of their weights with all tokens of the prompts."""
    encoders = [part for part in parts if part.is_encoder]
    if not encoders or not subject.text:
        return None
    flops = sum(2.0 * (part.parameters - part.embedding) for part in encoders)
    moved = prompts * sum(part.size for part in encoders)
    return rates.seconds(Work(flops * subject.text * prompts, 0, moved))


def _peaks(
    parts: list[ComponentSize], dense: Range, sparse: Range, decode: Work | None
) -> dict[str, Range]:
    """Bytes on the device at most, by mode of offloading."""
    decoded = 0 if decode is None else decode.peak
    step = Range(max(dense.low, sparse.low), max(dense.high, sparse.high), sparse.source)

    def beside(part: ComponentSize) -> Range:
        if part.name.startswith(("transformer", "unet")):
            return step
        return Range(decoded, decoded, "traced") if part.name == "vae" else Range(0, 0, "")

    whole = sum(part.size for part in parts)
    held: dict[str, Callable[[ComponentSize], int]] = {
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
