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

        pipe.load_lora_weights(gen_accel.demo.stream_lora_path())
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
        from gen_accel.pipelines.generation.config import Clip
        from gen_accel.pipelines.generation.stream import Streamer, StreamSettings, stream_clip

    is_told = zones is not None and noise is not None
    own = StreamSettings() if is_told else StreamSettings.of_pipe(pipe)
    noise = own.noise if noise is None else noise
    settings = StreamSettings(zones or own.zones, noise, own.shift)
    clip = stream_clip(pipe, Clip(frames=frames, **fields))
    return Streamer(pipe, clip, settings, prompt).frames(earlier, kept)
