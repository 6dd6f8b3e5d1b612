"""Preview of a video that is being made: a few frames of its latents, in colours.

A linear map takes the channels to red, green and blue. The families hold published factors of
published autoencoders. For any other autoencoder it is fitted by least squares to a piece of the
latents themselves and their pixels: a small decoder makes other colours of random latents.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from gen_accel.attention_processors.attached.clock import first_transformer
from gen_accel.attention_processors.families import families
from gen_accel.attention_processors.families.latents import unscaled
from gen_accel.attention_processors.families.sites import Model
from gen_accel.io import replacing
from gen_accel.pipelines.generation.progress import Tick
from gen_accel.pipelines.generation.sampling import Clip, parameters, served_family
from gen_accel.video import vae_factor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Colors = tuple[Tensor, Tensor]  # factors (C, 3) and bias (3,), float32 on the CPU

SIDE = 32  # most latents a side of the piece that is decoded for a fit
FRAMES = 2  # latent frames of it, each decoded by itself
RIDGE = 1e-2  # share of the variance that is added, so that channels without effect get none
SHOWN, COLUMNS = 8, 4  # frames, at most
WIDTH = 320  # pixels of a frame, at most
LARGER = 8  # times, at most: pixels of most models in a latent


class NoPreview(UserWarning):
    """A preview cannot be drawn; the video goes on without."""


class Preview:
    """Pictures of what a video looks like so far, each of which replaces the last.

    A picture shows the clean latents that the last step heads for. Nothing is drawn or changed:
    the video is the same, bit for bit.

    Args:
        every: steps from one picture to the next; the last step has one too.
    """

    def __init__(self, pipe: "DiffusionPipeline", clip: Clip, path: Path, every: int) -> None:
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

        times: list[float] = []

        def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            latents = args[0] if args else kwargs["hidden_states"]
            time = args[1] if len(args) > 1 else kwargs["timestep"]
            at = float(torch.as_tensor(time).flatten()[0])
            if times and at == times[-1]:  # the other half of guidance
                return
            times.append(at)
            self.watch(latents[:1, : channels_of(self.pipe.vae)])
            if len(times) > 1:
                both(len(times) - 1, len(self.pipe.scheduler.timesteps))

        with ExitStack() as stack:
            if "callback_on_step_end" not in parameters(self.pipe):
                module = first_transformer(self.pipe)
                hook = module.register_forward_pre_hook(look, with_kwargs=True)
                stack.callback(hook.remove)
            yield both, self.watch

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


def frames_first(pipe: "DiffusionPipeline", clip: Clip, latents: Tensor) -> Tensor:
    """Bring latents as a pipeline reports them to (C, f, h, w), of the first sample."""
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


def colored(pipe: "DiffusionPipeline", latents: Tensor) -> np.ndarray:
    """Colour at most `SHOWN` frames of (C, f, h, w) latents, evenly spaced, as (F, h, w, 3)
    uint8."""
    factors, bias = colors_of(pipe, latents)
    count = latents.shape[1]
    shown = torch.linspace(0, count - 1, min(SHOWN, count)).round().long()
    few = latents[:, shown.to(latents.device)].float().cpu()
    rgb = torch.einsum("cfhw,cd->fhwd", few, factors) + bias
    return ((rgb + 1) * 127.5).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).numpy()


def colors_of(pipe: "DiffusionPipeline", latents: Tensor) -> Colors:
    """Return the map for the latents of a pipeline: published, fitted, or in false colours.

    An autoencoder that waits in the CPU's memory decodes nothing in between, as that would move
    the transformer out.

    Args:
        latents: (C, f, h, w), as the pipeline denoises them, with as little noise as can be.
    """
    found = published_colors(pipe.vae)
    if found is not None:
        return found
    if hasattr(pipe.vae, "_hf_hook"):
        return false_colors(latents)
    try:
        return fitted_colors(pipe.vae, latents, pipe._execution_device)
    except Exception:  # whatever a decoder says of a size or a frame that it does not take
        return false_colors(latents)


def published_colors(vae: Model) -> Colors | None:
    """Return the published map of an autoencoder; None without."""
    kinds = [kind.__name__ for kind in type(vae).__mro__]
    for one in (one for family in families() for one in family.colors):
        value = vae.config.get(one.entry)
        value = tuple(value) if isinstance(value, list) else value
        factors = one.factors.T
        if one.autoencoder in kinds and value == one.value and len(factors) == channels_of(vae):
            return factors, torch.tensor(one.bias)
    return None


def channels_of(vae: Model) -> int:
    """Channels of an autoencoder's latents."""
    return int(vae.config.get("z_dim") or vae.config.latent_channels)


@torch.no_grad()
def fitted_colors(vae: Model, latents: Tensor, device: torch.device) -> Colors:
    """Fit the map by least squares, from a piece of (C, f, h, w) latents to its decoded pixels."""
    frames, height, width = latents.shape[1:]
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    piece = latents[:, :, top : top + SIDE, left : left + SIDE].float()
    chosen = torch.linspace(0, frames - 1, min(FRAMES, frames)).round().long().tolist()
    x = torch.cat([piece[:, i].flatten(1).T for i in chosen]).double().cpu()
    y = torch.cat([_pixels(vae, piece[:, i : i + 1], device) for i in chosen]).double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("latents or pixels are not finite")
    mean_x, mean_y = x.mean(0), y.mean(0)
    covariance = (x - mean_x).T @ (x - mean_x)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    factors = torch.linalg.solve(covariance, (x - mean_x).T @ (y - mean_y))
    return factors.float(), (mean_y - mean_x @ factors).float()


def false_colors(latents: Tensor) -> Colors:
    """Map the three directions in which (C, f, h, w) latents differ most to three colours."""
    x = latents.float().flatten(1).T.cpu()
    mean = x.mean(0)
    values, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    most = min(3, len(values))
    factors = torch.zeros(len(values), 3)
    deviations = values[-most:].clamp(min=1e-12).sqrt()
    factors[:, :most] = (directions[:, -most:] / (2 * deviations)).flip(1)
    return factors, -mean @ factors


def _pixels(vae: Model, frame: Tensor, device: torch.device) -> Tensor:
    """Decode one latent frame, (C, 1, h, w), to the mean colour under each latent, (h w, 3)."""
    z = unscaled(vae, frame[None].to(device, vae.dtype))
    if type(vae).__name__ == "AutoencoderKL":  # of pictures
        made = vae.decode(z[:, :, 0], return_dict=False)[0][:, :, None]
    else:
        timed = getattr(vae.config, "timestep_conditioning", False)
        given = {"temb": torch.zeros(1, device=device, dtype=vae.dtype)} if timed else {}
        made = vae.decode(z, return_dict=False, **given)[0]
    height, width = frame.shape[2:]
    return F.adaptive_avg_pool3d(made.float().cpu(), (1, height, width))[0].flatten(1).T


def contact_sheet(frames: np.ndarray) -> np.ndarray:
    """Lay (F, h, w, 3) frames side by side, enlarged, `COLUMNS` in a row."""
    count, height, width = frames.shape[:3]
    scale, columns = max(1, min(LARGER, WIDTH // width)), min(COLUMNS, count)
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for i, frame in enumerate(frames):
        large = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(large, (i % columns * width, i // columns * height))
    return np.asarray(sheet)


def _clean(pipe: "DiffusionPipeline", before: Tensor | None, now: Tensor, done: int) -> Tensor:
    """Return the clean latents that a step heads for.

    Of latents a clean + s noise, two with the same noise have one solution. If the scheduler's
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
    """Return the shares of clean latents and noise after `i` steps; None if they are not known."""
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


def _grid(pipe: "DiffusionPipeline", clip: Clip) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip."""
    frames, height, width = clip.frames, clip.height, clip.width
    temporal, spatial = vae_factor(pipe, "temporal"), vae_factor(pipe, "spatial")
    if not (frames and height and width and temporal and spatial):
        raise ValueError("it is not known how large the latents are")
    return (frames - 1) // temporal + 1, height // spatial, width // spatial
