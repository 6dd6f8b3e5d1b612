"""Train a model of the world of `scenes`: `PYTHONPATH=examples python -m demo_model.train_scenes`.

Stages, each of which leaves its result in the working folder and is skipped when that is there:

    autoencoder  on short clips
    text         the text encoder learns to name, at each word, all that its caption says
    pictures     the transformer learns from first frames what is to be seen
    clips        and from clips of 33 frames how it moves

On one core they take about 17, 3 and 50 minutes, and some 2 hours.

A stage can be broken off at any time: it goes on at its last checkpoint and ends in the same bits,
on the same kind of device with as many threads. All is drawn from seeds, step by step. What lies
in the folder of `--from`, as `scenes.json` there says, counts as done, so that a run begins behind
it. The whole runs on a GPU where there is one, by the same recipe.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from demo_model import whole_clip
from demo_model.judge import SCORED, scored_scenes
from demo_model.scenes import (
    BACKGROUNDS,
    BEHIND,
    COLORS,
    FRONT,
    MOTIONS,
    SHAPES,
    SIZES,
    Film,
    Scene,
    draw,
    scene_of,
    trained_seeds,
)
from demo_model.train import (
    Log,
    Phase,
    follow,
    linear_end,
    load_checkpoint,
    new_optimizers,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    noise_levels,
    psnr,
    reconstruction_loss,
    save_checkpoint,
    save_model,
    save_tensors,
    set_lr,
    update,
    warmup,
)
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers import transformer_wan
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, UMT5EncoderModel

from gen_accel.demo import DIRECTIONS, SPEEDS
from gen_accel.io import replacing

OUT = Path(__file__).parent / "scenes_model"
REPORT = "scenes.json"  # beside the weights: what is done, and how well
SIZE, FRAMES = 96, 33  # of the clips
CHANNELS, CELL = 8, 4  # of latents, and how many pixels high and wide one is
PATCH = 2  # latents high and wide that a token is

CHECKPOINT = 100  # steps
OBJECT = 90 / 127.5 - 1  # the least level of an object's brightest channel; no background has it
AUTOENCODER = Phase(1600, 8, 9, 48)  # one size, for which it is compiled once
KL = 3e-4  # weight
MEASURED = 64  # clips, for the statistics of latents

WIDTH = 96  # of a text's features
TEXT_TOKENS = 32  # the longest caption has 24
TEXT_STEPS, TEXT_BATCH = 1200, 128

HEADS, LAYERS = 3, 8
SHARD = 256  # clips
PICTURE_RATE, CLIP_RATE = 2e-3, 4e-3  # of learning, at its highest
SHIFT = 3.0  # of the noise schedule, in training and in generation
PICTURES = 16_384
CLIPS = 6144
PICTURE_PHASES = (Phase(4000, 32, 1, SIZE),)
CLIP_PHASES = Phase(800, 16, 3, SIZE), Phase(1200, 10, 5, SIZE), Phase(2200, 6, 9, SIZE)
NAMED = 0.05  # weight of what tokens say they show
NO_CAPTION = 0.1  # share of the captions that are left out, for guidance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/scenes_training"),
        help="folder of checkpoints, latents and train.log; give the same one to go on",
    )
    parser.add_argument(
        "--from",
        type=Path,
        default=OUT,
        dest="start",
        help="pipeline folder whose finished stages are not trained again "
        f"(default: {OUT.name} beside this script; a folder that is not there: train all)",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="pipeline folder to write")
    parser.add_argument(
        "--until", choices=[*STAGES], default=[*STAGES][-1], help="the last stage to train"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile what is trained, which takes half the time and a C++ compiler",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.work, torch.device(args.device), compiles=args.compile)
    run.begin(args.start)
    names = [*STAGES]
    for name in names[: names.index(args.until) + 1]:
        if run.is_done(name):
            continue
        STAGES[name].train(run)
        run.pack(args.out)


@dataclass(frozen=True)
class Stage:
    """
    Args:
        kind: what it trains, which lies in the folder `part` of a pipeline.
    """

    train: "Callable[[Run], None]"
    kind: type[ModelMixin] | type[PreTrainedModel]
    part: str


class Run:
    """A working folder, and the device that trains in it."""

    def __init__(self, work: Path, device: torch.device, *, compiles: bool) -> None:
        self.work, self.device, self.compiles = work, device, compiles
        work.mkdir(parents=True, exist_ok=True)

    def path(self, stage: str) -> Path:
        """Of a stage's weights, once they are finished."""
        return self.work / stage

    @property
    def report(self) -> dict[str, dict]:
        """Finished stage to its figures."""
        path = self.work / REPORT
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def begin(self, start: Path) -> None:
        """Take over what is finished in the pipeline folder `start`, as float32."""
        if not (start / REPORT).exists():
            return
        for name, figures in json.loads((start / REPORT).read_text("utf-8")).items():
            if not self.path(name).exists():
                stage = STAGES[name]
                model = stage.kind.from_pretrained(start / stage.part, dtype=torch.float32)
                self.finish(name, model, **figures)

    def finish(self, stage: str, model: ModelMixin | PreTrainedModel, **figures: object) -> None:
        """Keep a stage's weights, with what was measured of them."""
        with replacing(self.work / REPORT) as partial:
            partial.write_text(json.dumps(self.report | {stage: figures}, indent=2) + "\n")
        save_model(model, self.path(stage))

    def last(self, part: str) -> str | None:
        """The last stage of a pipeline's part that is finished."""
        done = [x for x, stage in STAGES.items() if stage.part == part and self.path(x).exists()]
        return done[-1] if done else None

    def is_done(self, name: str) -> bool:
        """Whether a stage is finished, or one that would go on from it."""
        last = self.last(STAGES[name].part)
        names = [*STAGES]
        return last is not None and names.index(last) >= names.index(name)

    def load(self, part: str) -> Any:
        """What the last finished stage of a part has left, on the device, to be called alone."""
        name = self.last(part)
        assert name is not None
        model: Any = STAGES[name].kind.from_pretrained(self.path(name), dtype=torch.float32)
        if issubclass(STAGES[name].kind, ModelMixin):
            # What is packed names its stage, not a folder of this machine.
            model.register_to_config(_name_or_path=name)
        return model.to(self.device).requires_grad_(False).eval()

    def generator(self, stage: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(stage * 10**9 + step)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train(
        self,
        stage: str,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        rate: float,
        steps: int,
        loss_of: Callable[[int], tuple[Tensor, str]],
        parameters: list[nn.Parameter] | None = None,
    ) -> None:
        """Take `steps` steps, or those that are left, and put the average into `model`.

        Args:
            rate: of learning, at its highest.
            loss_of: step to its loss, and what the log says of it.
            parameters: of the optimisers (default: all that ask for gradients).
        """
        log = Log(self.work / "train.log", stage)
        checkpoint = self.work / f"{stage}.safetensors"
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
        if parameters is None:
            parameters = [p for p in model.parameters() if p.requires_grad]
        for step in range(load_checkpoint(checkpoint, model, average, optimizers), steps):
            for optimizer in optimizers:
                set_lr(optimizer, rate * warmup(step, 50) * linear_end(step / steps))
            loss, said = loss_of(step)
            update(loss, optimizers, parameters)
            follow(average, model, step)
            if step % 50 == 0:
                log(f"step {step} of {steps}  loss {loss.item():.4f}  {said}")
            if (step + 1) % CHECKPOINT == 0:
                save_checkpoint(checkpoint, step + 1, model, average, optimizers)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(average[name])

    def pack(self, out: Path) -> None:
        """Write what is finished as a pipeline in float16, with the report beside it."""
        parts = {stage.part: self.last(stage.part) for stage in STAGES.values()}
        models: dict[str, Any] = {
            part: name and self.load(part).cpu().half() for part, name in parts.items()
        }
        pipe = WanPipeline(
            tokenizer=new_tokenizer(words()),  # pyright: ignore[reportArgumentType]
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),  # pyright: ignore
            **models,
        )
        pipe.save_pretrained(out)
        figures = {name: self.report[name] for name in parts.values() if name is not None}
        with replacing(out / REPORT) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n")


def films(phase: Phase, seeds: list[int], generator: torch.Generator) -> Tensor:
    """(B, 3, F, size, size) in [-1, 1], a part of each scene's picture."""
    clips = []
    for seed in seeds:
        video = draw(scene_of(seed), frames=phase.frames, seed=seed, size=SIZE).video
        top, left = torch.randint(SIZE - phase.size + 1, (2,), generator=generator).tolist()
        clips.append(video[:, top : top + phase.size, left : left + phase.size])
    return torch.stack(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_autoencoder(run: Run) -> None:
    torch.manual_seed(1)
    vae: Any = new_autoencoder()
    vae = vae.to(run.device)
    phase, steps = AUTOENCODER, AUTOENCODER.steps

    def passed(video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = whole_clip.encode(vae, video).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-12, 4)
        latent = mean + noise * (0.5 * log_variance).exp()
        return mean, log_variance, whole_clip.decode(vae, latent).float()

    if run.compiles:
        passed = torch.compile(passed, dynamic=False)

    def loss_of(step: int) -> tuple[Tensor, str]:
        g = run.generator(1, step)
        video = films(phase, trained_seeds(step * 100, phase.batch), g).to(run.device)
        cells = phase.size // CELL
        shape = phase.batch, CHANNELS, 1 + phase.frames // 4, cells, cells
        noise = torch.randn(shape, generator=g).to(run.device)
        with run.autocast():
            mean, log_variance, output = passed(video, noise)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(output, video, video.amax(1, keepdim=True) > OBJECT) + KL * kl
        return loss, f"{psnr(F.mse_loss(output, video).item()):.2f} dB  KL {kl.item():.3f}"

    optimizers, parameters = _kernel_optimizers(vae)
    run.train("autoencoder", vae, optimizers, 4e-3, steps, loss_of, parameters)
    run.finish("autoencoder", with_statistics(vae), steps=steps, **fidelity(vae))


def new_autoencoder() -> AutoencoderKLWan:
    """4x smaller in space and in time: at 8x, edges stay blurred."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 4, 8],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=1,
        in_channels=3,
        out_channels=3,
        scale_factor_spatial=CELL,
        scale_factor_temporal=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def _kernel_optimizers(
    model: nn.Module,
) -> tuple[list[torch.optim.Optimizer], list[nn.Parameter]]:
    """Muon for kernels, as matrices with a row for each output, and AdamW for the rest; and the
    parameters that they have. A matrix shares the memory of its kernel."""
    matrices: dict[str, nn.Parameter] = {}
    rest: list[nn.Parameter] = []
    for name, kernel in model.named_parameters():
        if kernel.ndim < 4:
            rest.append(kernel)
            continue
        matrix = matrices[name] = nn.Parameter(kernel.detach().flatten(1))

        def hand_over(kernel: Tensor, matrix: nn.Parameter = matrix) -> None:
            assert kernel.grad is not None
            matrix.grad, kernel.grad = kernel.grad.flatten(1), None

        kernel.register_post_accumulate_grad_hook(hand_over)
    muon = torch.optim.Muon(matrices.items(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam], [*matrices.values(), *rest]


def encoded(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to the means, (B, z, f, h, w), as the encoder has them."""
    device = vae.device
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        return whole_clip.encode(vae, videos.to(device))[:, :CHANNELS].float()


def with_statistics(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Write the mean and spread of each channel, over `MEASURED` clips, into the config."""
    parts = []
    for first in range(0, MEASURED, 8):
        seeds = trained_seeds(100_000_000 + first * 100, 8)
        clip = Phase(0, 8, FRAMES, SIZE)
        parts.append(encoded(vae, films(clip, seeds, torch.Generator())))
    latents = torch.cat(parts)
    mean, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in spread.tolist()],
    )
    return vae


def fidelity(vae: AutoencoderKLWan, clips: int = 40) -> dict[str, float]:
    """PSNR of clips of 33 frames that are scored, encoded and decoded, in dB: the mean of the
    clips, and of their mean error."""
    errors = []
    with torch.no_grad():
        for i, scene in enumerate(scored_scenes(clips)):
            video = draw(scene, frames=FRAMES, seed=SCORED + i, size=SIZE).video
            video = video.permute(3, 0, 1, 2)[None].to(vae.device) / 127.5 - 1
            latents = whole_clip.encode(vae, video)[:, :CHANNELS]
            output = whole_clip.decode(vae, latents).clamp(-1, 1)
            errors.append(F.mse_loss(output, video).item())
    mean = sum(map(psnr, errors)) / clips
    return {"db": round(mean, 2), "db_of_mean_error": round(psnr(sum(errors) / clips), 2)}


@cache
def words() -> list[str]:
    """All words and marks of the world's captions."""
    captions = (scene_of(seed).caption for seed in range(2000))
    return sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption)})


FIELDS: dict[str, tuple] = {
    "count": (1, 2, 3, 4),
    "size": (*SIZES,),
    "color": (*COLORS,),
    "shape": SHAPES,
    "motion": MOTIONS,
    "direction": (*DIRECTIONS, None),
    "speed": (*SPEEDS, None),
    "depth": (FRONT, BEHIND, None),
    "background": BACKGROUNDS,
    "pan": ("left", "right", None),
    "other_color": (*COLORS, None),
    "other_shape": (*SHAPES, None),
}


def said(scene: Scene) -> list[int]:
    """What a caption says of each of `FIELDS`, as the number of its value."""
    group, other = scene.group, scene.other
    values = {
        "count": group.count,
        "size": group.size,
        "color": group.color,
        "shape": group.shape,
        "motion": scene.motion,
        "direction": scene.direction,
        "speed": scene.speed,
        "depth": scene.depth,
        "background": scene.background,
        "pan": scene.pan,
        "other_color": other.color if other else None,
        "other_shape": other.shape if other else None,
    }
    return [known.index(values[name]) for name, known in FIELDS.items()]


class Reader(nn.Module):
    """The text encoder, and what names the fields at each of its tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary=vocabulary, width=WIDTH)
        self.names = nn.Linear(WIDTH, sum(map(len, FIELDS.values())))

    def forward(self, tokens: dict[str, Tensor]) -> list[Tensor]:
        """For each field the logits of its values, at the tokens that are there."""
        states = self.text_encoder(**tokens).last_hidden_state[tokens["attention_mask"] > 0]
        return [*self.names(states).split([*map(len, FIELDS.values())], dim=-1)]


def train_text(run: Run) -> None:
    """Learn to name at each word all that the caption says: who attends to any word of it then
    knows all, and need not first learn to find what belongs together."""
    torch.manual_seed(4)
    tokenizer = new_tokenizer(words())
    reader = Reader(len(tokenizer)).to(run.device)
    steps = TEXT_STEPS

    def loss_of(step: int) -> tuple[Tensor, str]:
        scenes = [*map(scene_of, trained_seeds(200_000_000 + step * 1000, TEXT_BATCH))]
        tokens = tokenized(tokenizer, [scene.caption for scene in scenes], run.device)
        truth = torch.tensor([*map(said, scenes)], device=run.device)
        at = tokens["attention_mask"].nonzero()[:, 0]  # the caption of each token
        logits = reader(tokens)
        loss = sum(F.cross_entropy(x, truth[at, i]) for i, x in enumerate(logits))
        right = torch.stack([x.argmax(-1) == truth[at, i] for i, x in enumerate(logits)])
        assert isinstance(loss, Tensor)
        return loss / len(logits), f"{right.all(0).float().mean():.4f} of the words know all"

    optimizer = torch.optim.AdamW(reader.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    run.train("text", reader, [optimizer], 3e-3, steps, loss_of)
    with torch.no_grad():
        unseen = [scene for scene in scored_scenes(400) if scene.is_held_out]
        tokens = tokenized(tokenizer, [scene.caption for scene in unseen], run.device)
        truth = torch.tensor([*map(said, unseen)], device=run.device)
        at = tokens["attention_mask"].nonzero()[:, 0]
        wrong = [x.argmax(-1) != truth[at, i] for i, x in enumerate(reader(tokens))]
        share = 1 - torch.stack(wrong).any(0).float().mean().item()
    run.finish("text", reader.text_encoder, steps=steps, words_that_know_all=round(share, 4))


def tokenized(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Ids and mask of captions, (B, `TEXT_TOKENS`)."""
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    return {name: value.to(device) for name, value in tokens.items()}


# Of what a token shows: colour and form, 0 for the background, and where its object's middle is,
# in rows and columns of half a token.
SHOWN = 1 + len(COLORS), 1 + len(SHAPES) * len(SIZES), 17, 17


def shown(scene: Scene, film: Film) -> Tensor:
    """Truth of each token of a clip, (f, h, w, 4) int8, at the frame that its latent begins
    with."""
    frames = [*range(0, len(film.video), 4)]
    cells = F.avg_pool2d(film.visible[:, frames].float(), 8)  # (O, f, h, w)
    share, which = cells.max(0)
    groups = [scene.group] * scene.group.count + [*scene.groups[1:]]
    colors = torch.tensor([1 + [*COLORS].index(group.color) for group in groups])
    forms = torch.tensor(
        [1 + 2 * SHAPES.index(group.shape) + [*SIZES].index(group.size) for group in groups]
    )
    found = [colors[which], forms[which]]
    middles = (torch.arange(SIZE // 8) + 0.5) * 8
    x, y = film.centers[:, frames].movedim(-1, 0)[..., None, None]  # (O, f, 1, 1) of each
    for off in (y - middles[:, None], x - middles):
        off = off.expand_as(cells).gather(0, which[None])[0]
        near = torch.remainder(off + SIZE / 2, SIZE) - SIZE / 2  # around the edge
        found.append((near / 4).round().clamp(-8, 8) + 8)
    return (torch.stack(found, -1) * (share > 0.1)[..., None]).to(torch.int8)


@dataclass(frozen=True)
class Latents:
    """Cached clips: normalised latents (N, z, f, h, w), half precision, what they show as `shown`
    says it, and their seeds."""

    latents: Tensor
    shown: Tensor
    seeds: list[int]

    @classmethod
    def drawn(cls, run: Run, frames: int, count: int) -> "Latents":
        """Draw and encode `count` clips, or read the ones that are there."""
        vae, log = run.load("vae"), Log(run.work / "train.log", "latents")
        statistics = vae.config["latents_mean"], vae.config["latents_std"]
        mean, spread = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in statistics)
        folder = run.work / f"latents_{frames}"
        for shard in range(count // SHARD):
            path = folder / f"{shard:03d}.safetensors"
            if path.exists():
                continue
            seeds = trained_seeds(300_000_000 + frames * 10**6 + shard * 2 * SHARD, SHARD)
            parts, truth = [], []
            for first in range(0, SHARD, 16):
                part = [(scene_of(seed), seed) for seed in seeds[first : first + 16]]
                drawn = [draw(scene, frames=frames, seed=seed, size=SIZE) for scene, seed in part]
                truth += [shown(scene, film) for (scene, _), film in zip(part, drawn, strict=True)]
                video = torch.stack([film.video for film in drawn]).permute(0, 4, 1, 2, 3)
                parts.append((encoded(vae, video / 127.5 - 1).cpu() - mean) / spread)
            tensors = {
                "latents": torch.cat(parts).half().contiguous(),
                "shown": torch.stack(truth),
                "seeds": torch.tensor(seeds),
            }
            save_tensors(tensors, path)
            log(f"{frames} frames, {(shard + 1) * SHARD} of {count} clips")
        shards = [load_file(folder / f"{i:03d}.safetensors") for i in range(count // SHARD)]
        joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        return cls(joined["latents"], joined["shown"], joined["seeds"].tolist())


class Painter(nn.Module):
    """A transformer that also says, halfway, what each token shows when the noise is gone.

    A picture's error is small where an object has the wrong shape, or is one too many. Here both
    count for as much as they do to who looks at it. Of use in training alone.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.shows = nn.Linear(64 * HEADS, sum(SHOWN))
        self.middle = torch.empty(0)
        transformer.blocks[LAYERS // 2].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: object, states: Tensor) -> None:
        self.middle = states

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, noise - clean, and logits of what is shown, (B, N, sum(`SHOWN`))."""
        velocity = self.transformer(noisy, sigma * 1000, text, return_dict=False)[0].float()
        return velocity, self.shows(self.middle).float()


class Padded:
    """Attention by plain products, as diffusers calls it, over texts that are padded.

    Wan pads a text with zeros that its cross-attention sees, to a length that the caller chooses,
    and any of them must do. They are all alike, so that one of them stands for the rest. On a CPU
    and for so few tokens this takes half the time of the fused kernel.
    """

    def __init__(self) -> None:
        self.more = torch.zeros(1, 1, 1, TEXT_TOKENS)

    def draw(self, batch: int, generator: torch.Generator, device: torch.device) -> None:
        """Draw the lengths of a batch's texts, from `TEXT_TOKENS` to 512."""
        share = torch.rand(batch, generator=generator)
        lengths = TEXT_TOKENS * (512 / TEXT_TOKENS) ** share
        last = (lengths - TEXT_TOKENS + 1).log().to(device)
        self.more = F.pad(last.view(-1, 1, 1, 1), (TEXT_TOKENS - 1, 0))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        """(B, N, H, D) of each."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if k.shape[2] == TEXT_TOKENS:
            scores = scores + self.more
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def train_pictures(run: Run) -> None:
    torch.manual_seed(5)
    transformer = new_transformer(
        heads=HEADS, layers=LAYERS, text=WIDTH, channels=CHANNELS, patch=PATCH
    )
    _train_transformer(run, "pictures", transformer, PICTURE_PHASES, PICTURE_RATE, (1, PICTURES))


def train_clips(run: Run) -> None:
    transformer = run.load("transformer").requires_grad_()
    _train_transformer(run, "clips", transformer, CLIP_PHASES, CLIP_RATE, (FRAMES, CLIPS))


def _train_transformer(
    run: Run,
    stage: str,
    transformer: WanTransformer3DModel,
    phases: tuple[Phase, ...],
    rate: float,
    cached: tuple[int, int],
) -> None:
    """Train by flow matching.

    Args:
        phases: one after the other; `frames` counts latents.
        rate: of learning, at its highest.
        cached: frames and number of the clips to learn from.
    """
    data = Latents.drawn(run, *cached)
    tokenizer, encoder = new_tokenizer(words()), run.load("text_encoder")
    number = [*STAGES].index(stage)
    order = [phase for phase in phases for _ in range(phase.steps)]
    model: Any = Painter(transformer).to(run.device)
    if run.compiles:
        # Static shapes: a run that goes on must not compile other code than one that went through.
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    padded, running = Padded(), 0.0

    def loss_of(step: int) -> tuple[Tensor, str]:
        nonlocal running
        phase, g = order[step], run.generator(number, step)
        chosen = torch.randint(len(data.seeds), (phase.batch,), generator=g)
        clean = data.latents[chosen, :, : phase.frames].float()
        truth = data.shown[chosen, : phase.frames].long().flatten(1, 3).to(run.device)
        kept = torch.rand(phase.batch, generator=g) >= NO_CAPTION
        captions = [
            scene_of(data.seeds[i]).caption if keep else ""
            for i, keep in zip(chosen.tolist(), kept.tolist(), strict=True)
        ]
        padded.draw(phase.batch, g, run.device)
        sigma = noise_levels(phase.batch, g, SHIFT)
        noise = torch.randn(clean.shape, generator=g)
        mix = sigma.view(-1, 1, 1, 1, 1)
        noisy, velocity = (x.to(run.device) for x in (clean.lerp(noise, mix), noise - clean))
        text = features(encoder, tokenizer, captions)
        with run.autocast():
            found, logits = model(noisy, sigma.to(run.device), text)
        loss = F.mse_loss(found, velocity)
        parts = zip(logits.split([*SHOWN], dim=-1), truth.unbind(-1), strict=True)
        named = torch.stack([F.cross_entropy(x.mT, at) for x, at in parts]).sum()
        running = 0.98 * (running or loss.item()) + 0.02 * loss.item()
        line = f"running {running:.4f}  named {named.item():.3f}  {phase.frames} latents"
        return loss + NAMED * named, line

    with patch.object(transformer_wan, "dispatch_attention_fn", padded):
        run.train(stage, model, new_optimizers(model), rate, len(order), loss_of)
    run.finish(stage, transformer, steps=len(order))


def features(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> Tensor:
    """What a pipeline gives the transformer of captions, (B, `TEXT_TOKENS`, `WIDTH`)."""
    tokens = tokenized(tokenizer, captions, encoder.device)
    with torch.no_grad():
        return encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]


STAGES = {
    "autoencoder": Stage(train_autoencoder, AutoencoderKLWan, "vae"),
    "text": Stage(train_text, UMT5EncoderModel, "text_encoder"),
    "pictures": Stage(train_pictures, WanTransformer3DModel, "transformer"),
    "clips": Stage(train_clips, WanTransformer3DModel, "transformer"),
}

if __name__ == "__main__":
    main()
