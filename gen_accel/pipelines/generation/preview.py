"""Preview of a video that is being made: a few frames of its latents, in colours."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_accel.attention_processors.lengths import vae_factor
from gen_accel.io import replacing
from gen_accel.pipelines.generation.latent_colors import channels_of, colors_of
from gen_accel.pipelines.generation.progress import Tick
from gen_accel.pipelines.generation.sampling import (
    Clip,
    first_transformer,
    parameters,
    served_family,
)

SHOWN, COLUMNS = 8, 4  # frames, at most
WIDTH = 320  # pixels of a frame, at most
LARGER = 8  # times, at most: pixels of most models in a latent


def preview_of(target: Path) -> Path:
    """Path of the preview beside `target`, `clip.mp4` to `clip.preview.png`."""
    return target.with_name(f"{target.stem}.preview.png")


class NoPreview(UserWarning):
    """A preview cannot be drawn; the video goes on without."""


class Preview:
    """Pictures of what a video looks like so far, each of which replaces the last.

    A picture shows the clean latents that the last step heads for, by a linear map to colours; see
    `latent_colors`. Nothing is drawn or changed: the video is the same, bit for bit.

    Args:
        every: steps from one picture to the next; the last step has one too.
    """

    def __init__(self, pipe: Any, clip: Clip, path: Path, every: int) -> None:
        self.pipe, self.clip, self.path, self.every = pipe, clip, path, every
        self._before: Tensor | None = None
        self._now: Tensor | None = None
        self._ended = False

    def watch(self, latents: Tensor) -> None:
        """Take the latents at the end of a step."""
        self._before, self._now = self._now, latents.detach().clone()

    @contextmanager
    def seeing(self, tick: Tick) -> Iterator[tuple[Tick, Callable[[Tensor], None]]]:
        """Yield `tick` and `watch` of `sampling.sample`, which draw a picture if one is due.

        A pipeline that reports no steps is seen by what its transformer is called with.
        """

        def both(done: int, total: int) -> None:
            tick(done, total)
            if done == 1:  # of a clip, or of a part of it
                self._before = None
            due = done % self.every == 0 or done == total
            if due and self._now is not None and not self._ended:
                self.draw(done)

        hooks = []
        if "callback_on_step_end" not in parameters(self.pipe):
            look = _Look(self, both)
            module = first_transformer(self.pipe)
            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
        try:
            yield both, self.watch
        finally:
            for hook in hooks:
                hook.remove()

    def draw(self, done: int) -> None:
        """Write the picture after `done` steps. A fault of it warns, and ends the previews."""
        assert self._now is not None
        try:
            clean = _clean(self.pipe, self._before, self._now, done)
            sheet = contact_sheet(colored(self.pipe, frames_first(self.pipe, self.clip, clean)))
            with replacing(self.path) as partial:
                Image.fromarray(sheet).save(partial)
        except Exception as error:  # an hour of denoising is worth more than a picture
            self._ended = True
            warnings.warn(f"no preview at {self.path} any more: {error}", NoPreview, stacklevel=2)


class _Look:
    """Hook of a transformer that finds the latents of each step among its arguments."""

    def __init__(self, preview: Preview, tick: Tick) -> None:
        self.preview, self.tick = preview, tick
        self._times: list[float] = []

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        at = float(torch.as_tensor(time).flatten()[0])
        if self._times and at == self._times[-1]:  # the other half of guidance
            return
        self._times.append(at)
        pipe = self.preview.pipe
        self.preview.watch(latents[:1, : channels_of(pipe.vae)])
        if len(self._times) > 1:
            self.tick(len(self._times) - 1, len(pipe.scheduler.timesteps))


def frames_first(pipe: Any, clip: Clip, latents: Tensor) -> Tensor:
    """Bring latents as a pipeline reports them to (C, f, h, w), those of the first sample."""
    axes, channels = served_family(pipe).generation.axes, channels_of(pipe.vae)
    one = latents[0].float()
    match axes:
        case "fchw":
            one = one.transpose(0, 1)
        case "fhwc":
            one = one.movedim(-1, 0)
        case "tokens last" | "tokens first":
            frames, height, width = _grid(pipe, clip)
            count = frames * height * width
            one = one[-count:] if axes == "tokens last" else one[:count]
            one = one.T.reshape(-1, frames, height, width)
    return one[:channels]


def colored(pipe: Any, latents: Tensor) -> np.ndarray:
    """Colour at most `SHOWN` frames of (C, f, h, w) latents, evenly spaced, as (F, h, w, 3)
    uint8."""
    factors, bias = colors_of(pipe, latents)
    count = latents.shape[1]
    shown = torch.linspace(0, count - 1, min(SHOWN, count)).round().long()
    few = latents[:, shown.to(latents.device)].float().cpu()
    rgb = torch.einsum("cfhw,cd->fhwd", few, factors) + bias
    return ((rgb + 1) * 127.5).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).numpy()


def contact_sheet(frames: np.ndarray) -> np.ndarray:
    """Lay (F, h, w, 3) frames side by side, enlarged, `COLUMNS` in a row."""
    count, height, width = frames.shape[:3]
    scale = max(1, min(LARGER, WIDTH // width))
    large = [
        Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        for frame in frames
    ]
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * height * scale, columns * width * scale, 3), np.uint8)
    for i, frame in enumerate(large):
        top, left = i // columns * height * scale, i % columns * width * scale
        sheet[top : top + height * scale, left : left + width * scale] = np.asarray(frame)
    return sheet


def _clean(pipe: Any, before: Tensor | None, now: Tensor, done: int) -> Tensor:
    """Return the clean latents that a step heads for.

    Of latents a clean + s noise, two with the same noise have one solution. Where the scheduler's
    levels are not known, or each step draws other noise, the latents stay as they are.
    """
    scheduler = pipe.scheduler
    if before is None or before.shape != now.shape or scheduler.config.get("stochastic_sampling"):
        return now
    levels = [_level(scheduler, i) for i in (done - 1, done)]
    if None in levels:
        return now
    (a, s), (b, t) = [level for level in levels if level is not None]
    whole = t * a - s * b
    if abs(whole) < 1e-6:
        return now
    return (t * before.float() - s * now.float()) / whole


def _level(scheduler: Any, i: int) -> tuple[float, float] | None:
    """Return the shares of clean latents and noise after `i` steps; None where not known."""
    config, sigmas = scheduler.config, getattr(scheduler, "sigmas", None)
    flow = config.get("prediction_type") == "flow_prediction" or "Flow" in type(scheduler).__name__
    if flow and sigmas is not None and i < len(sigmas):
        sigma = float(sigmas[i])
        return (sigma, 1 - sigma) if config.get("invert_sigmas") else (1 - sigma, sigma)
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None or type(scheduler).__name__.startswith("Euler"):
        return None
    times = scheduler.timesteps
    clean = float(kept[int(times[i])]) if i < len(times) else 1.0
    return clean**0.5, (1 - clean) ** 0.5


def _grid(pipe: Any, clip: Clip) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip."""
    assert clip.frames is not None
    assert clip.height is not None
    assert clip.width is not None
    temporal, spatial = vae_factor(pipe, "temporal"), vae_factor(pipe, "spatial")
    assert temporal is not None
    assert spatial is not None
    return (clip.frames - 1) // temporal + 1, clip.height // spatial, clip.width // spatial
