"""Videos without end, in Python."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gen_accel.registry import needed_for

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from gen_accel.pipelines.zones import Zones


def stream(
    pipe: "DiffusionPipeline",
    prompt: str | Mapping[int, str],
    *,
    frames: int,
    zones: "Zones | None" = None,
    noise: float | None = None,
    earlier: "Sequence[Tensor]" = (),
    kept: "Callable[[int, Tensor], None] | None" = None,
    **fields: Any,
) -> "Iterator[np.ndarray]":
    """Make a video of any length chunk by chunk, and yield its frames as they come.

        pipe.load_lora_weights("demo_stream")
        for pixels in gen_accel.stream(pipe, "a red circle moves left", frames=1000):
            show(pixels)  # (f, H, W, 3) uint8

    Memory and the time of a frame do not grow with the length. The model is as it was once the
    iterator ends or is closed.

    Args:
        pipe: a diffusers pipeline with one transformer, on its device.
        prompt: the text, or texts by the frame from which each holds: {0: "...", 300: "..."}.
        frames: number of frames; the last chunk is cut.
        zones, noise: what a chunk sees of earlier ones, and the noise level of these. None: as the
            LoRA on the pipeline was trained.
        earlier: latents of the first chunks, to go on from; see `kept`.
        kept: called with the number and the latents (1, C, f, h, w) of each new chunk.
        fields: of `gen-accel generate`'s clip: height, width, steps, guidance_scale,
            negative_prompt, sampler, levels, shift, seed, fps, max_tokens.

    Raises:
        ValueError: before the first frame, a model or autoencoder that does not stream, sizes that
            the model would round, or prompts beyond the end.

    Warns:
        NotTrained: no LoRA on the pipeline was trained to stream.
    """
    with needed_for("a stream", extra="video"):
        from gen_accel.pipelines.generation import stream
        from gen_accel.pipelines.generation.config import Clip

    found = stream.settings_of(pipe) if zones is None or noise is None else stream.StreamSettings()
    settings = stream.StreamSettings(
        found.zones if zones is None else zones,
        found.noise if noise is None else noise,
        found.shift,
    )
    clip = Clip(frames=frames, **fields)
    streamer = stream.Streamer(pipe, stream.stream_clip(pipe, clip), settings, prompt)
    return streamer.frames(earlier, kept)
