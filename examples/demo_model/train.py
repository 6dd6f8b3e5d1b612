"""Train the demo model from nothing: `PYTHONPATH=examples python -m demo_model.train`.

Five stages, each of which leaves its result in the working folder and is skipped when that is
there: the autoencoder, its decoder alone on long clips, the latents of the training clips, the
text encoder and transformer together by flow matching, and the pipeline that ships. Everything is
drawn from seeds, step by step, so that a run that was interrupted goes on where it stopped.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from demo_model import whole_clip
from demo_model.clips import anonymous_caption
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from gen_accel.demo import WORDS
from gen_accel.demo.world import (
    BACKGROUND,
    SEEN,
    Scene,
    render,
)

LATENT_CHANNELS = 16
TEXT_WIDTH = 64
TEXT_TOKENS = 16  # the longest caption has 7
SHARD = 256  # clips
SHIFT = 3.0  # of the noise schedule, in training and in generation
MEETING = "denoiser_meeting"  # the file by which the training processes find one another


@dataclass(frozen=True)
class Phase:
    """`steps` steps on clips of one size; `frames` counts pixels or latents as the stage does."""

    steps: int
    batch: int
    frames: int
    size: int  # pixels


# Some of every kind of batch at every point: short clips on small canvases teach the most per
# second, long ones keep the colours from drifting beyond the length of the short ones.
AUTOENCODER_STEPS = 1300
AUTOENCODER_BATCHES = ((12, 9, 40), (6, 9, 64), (12, 9, 40), (3, 17, 64), (12, 9, 40), (1, 97, 40))
DECODER_STEPS = 1100
DECODER_BATCHES = ((2, 9, 96), (2, 49, 48), (4, 17, 56), (1, 129, 40))

CACHE = {48: (6144, 33), 96: (4096, 33)}  # canvas: clips, frames
CURRICULUM = (  # frames count latents
    Phase(600, 40, 2, 48),
    Phase(400, 28, 3, 48),
    Phase(700, 16, 5, 48),
    Phase(700, 16, 9, 48),
    Phase(100, 14, 2, 96),
    Phase(500, 6, 5, 96),
    Phase(7350, 4, 9, 96),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument("--work", type=Path, default=Path("outputs/demo_training"))
    parser.add_argument("--out", type=Path, default=Path("outputs/demo_model"))
    parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    for stage in (train_autoencoder, train_decoder, cache_latents):
        stage(args.work)
    if not (args.work / "denoiser").exists():
        (args.work / MEETING).unlink(missing_ok=True)  # of a run that was interrupted
        mp.spawn(train_denoiser, (args.threads, args.work), nprocs=args.threads)
    pack(args.work, args.out)


class Log:
    """Prints lines and appends them to a file, with the seconds spent since the stage began."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.wall, self.cpu = time.time(), time.process_time()

    def __call__(self, text: str) -> None:
        wall, cpu = time.time() - self.wall, time.process_time() - self.cpu
        line = f"{self.stage:<12} {wall:7.0f} s  {cpu:7.0f} core-s  {text}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def new_autoencoder() -> AutoencoderKLWan:
    """8x smaller in space, 4x in time, as Wan's own, with a first 2x done by patches."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def train_autoencoder(work: Path) -> None:
    if (work / "autoencoder").exists():
        return
    log = Log(work / "train.log", "autoencoder")
    torch.manual_seed(0)
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, video in _clips(AUTOENCODER_BATCHES, AUTOENCODER_STEPS):
        set_lr(optimizer, 2e-3 * warmup(step, 50) * cosine(step / AUTOENCODER_STEPS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, log_variance = whole_clip.encode(vae, video).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-12, 4)
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            output = whole_clip.decode(vae, latent).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(output, video, _is_object(video)) + 1e-3 * kl
        update(loss, [optimizer], list(vae.parameters()))
        if step % 50 == 0:
            mse = F.mse_loss(output, video).item()
            log(f"step {step}  {psnr(mse):.2f} dB  KL {kl.item():.3f}")
    save_model(vae, work / "autoencoder")


def train_decoder(work: Path) -> None:
    """Go on with the decoder alone, on clips far longer than those the encoder learned from."""
    if (work / "decoder").exists():
        return
    log = Log(work / "train.log", "decoder")
    torch.manual_seed(1)
    vae = AutoencoderKLWan.from_pretrained(work / "autoencoder")
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    for step, video in _clips(DECODER_BATCHES, DECODER_STEPS, seed=1_000_000):
        set_lr(optimizer, 8e-4 * warmup(step, 20) * cosine(step / DECODER_STEPS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                mean = whole_clip.encode(vae, video)[:, :LATENT_CHANNELS].float()
                # What the transformer makes is never exact: learn to decode near misses.
                mean = mean + 0.05 * mean.std() * torch.randn_like(mean)
            output = whole_clip.decode(vae, mean).float()
        update(reconstruction_loss(output, video, _is_object(video)), [optimizer], parameters)
        if step % 50 == 0:
            mse = F.mse_loss(output, video).item()
            log(f"step {step}  {tuple(video.shape[2:4])}  {psnr(mse):.2f} dB")
    save_model(vae, work / "decoder")


def cache_latents(work: Path) -> None:
    log = Log(work / "train.log", "latents")
    vae = AutoencoderKLWan.from_pretrained(work / "autoencoder").eval()
    for size, (clips, frames) in CACHE.items():
        for shard in range(clips // SHARD):
            path = work / f"latents_{size}" / f"{shard:03d}.safetensors"
            if path.exists():
                continue
            generator = torch.Generator().manual_seed(2_000_000 + 1000 * size + shard)
            latents, labels = [], torch.randint(len(SEEN), (SHARD,), generator=generator)
            for part in labels.split(16):
                scenes = [SEEN[i] for i in part.tolist()]
                video = render(scenes, frames=frames, size=size, generator=generator)
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    latents.append(whole_clip.encode(vae, video)[:, :LATENT_CHANNELS].half())
            save_tensors({"latents": torch.cat(latents).contiguous(), "labels": labels}, path)
            log(f"{size} pixels, {(shard + 1) * SHARD} of {clips} clips")


class Latents:
    """The cached clips of one canvas, normalised to zero mean and unit variance a channel."""

    def __init__(self, work: Path, size: int, mean: Tensor, std: Tensor) -> None:
        shards = [load_file(path) for path in sorted((work / f"latents_{size}").iterdir())]
        raw = torch.cat([shard["latents"] for shard in shards]).float()
        self.labels = torch.cat([shard["labels"] for shard in shards])
        self.latents = (raw - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)

    def draw(self, phase: Phase, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
        chosen = torch.randint(len(self.latents), (phase.batch,), generator=generator)
        scenes = [SEEN[i] for i in self.labels[chosen].tolist()]
        return self.latents[chosen, :, : phase.frames], scenes


def latent_statistics(work: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, over one shard of the largest canvas."""
    first = sorted((work / f"latents_{max(CACHE)}").iterdir())[0]
    latents = load_file(first)["latents"].float()
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def new_tokenizer(words: Iterable[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word of a world's captions."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_text_encoder(*, vocabulary: int, width: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]
        )
    )


def new_transformer(
    *, heads: int, layers: int, text: int, channels: int = LATENT_CHANNELS, patch: int = 1
) -> WanTransformer3DModel:
    """Heads of 64 on tokens of 1 x `patch` x `patch` latents, for texts of width `text`. It begins
    as 0."""
    transformer = WanTransformer3DModel(
        patch_size=(1, patch, patch),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=channels,
        out_channels=channels,
        text_dim=text,
        freq_dim=128,
        ffn_dim=256 * heads,
        num_layers=layers,
        rope_max_seq_len=256,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


class Denoiser(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary=32, width=TEXT_WIDTH)
        self.transformer = new_transformer(heads=2, layers=6, text=TEXT_WIDTH)

    def forward(
        self, noisy: Tensor, sigma: Tensor, tokens: dict[str, Tensor], padded: int
    ) -> Tensor:
        """The velocity, noise - clean. `padded` is the text's length with its zeros, in tokens."""
        text = self.text_encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        text = F.pad(text, (0, 0, 0, padded - text.shape[1]))
        return self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest."""
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.startswith("transformer.blocks.")
    }
    others = {name: p for name, p in model.named_parameters() if name not in matrices}
    return [
        torch.optim.Muon(matrices.items(), weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others.items(), betas=(0.9, 0.99), weight_decay=0.0),
    ]


def train_denoiser(rank: int, ranks: int, work: Path) -> None:
    """One of `ranks` processes of one thread each, which share every batch.

    The model is small, and its operations too short to be worth splitting among threads.
    """
    torch.set_num_threads(1)
    # At this size plain products in half precision take two thirds of the fused kernel's time.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    meeting = f"file://{(work / MEETING).resolve()}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    log = Log(work / "train.log", "denoiser")
    torch.manual_seed(3)
    tokenizer, model = new_tokenizer(), Denoiser()
    optimizers = new_optimizers(model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoint = work / "denoiser_checkpoint"
    start = load_checkpoint(checkpoint, model, average, optimizers)

    mean, std = latent_statistics(work)
    data = {size: Latents(work, size, mean, std) for size in CACHE}
    total, running = sum(phase.steps for phase in CURRICULUM), 0.0
    for step, phase in enumerate(p for p in CURRICULUM for _ in range(p.steps)):
        if step < start:
            continue
        generator = torch.Generator().manual_seed(3_000_000 + step)
        clean, scenes = data[phase.size].draw(phase, generator)
        captions = [_caption(scene, generator) for scene in scenes]
        tokens = tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
        )
        # Wan pads its text with zeros that its cross-attention sees, to a length that the caller
        # chooses: any of them must do.
        padded = TEXT_TOKENS * 2 ** int(torch.randint(6, (), generator=generator))
        sigma = noise_levels(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator)
        mix = sigma.view(-1, 1, 1, 1, 1)
        for optimizer in optimizers:
            set_lr(optimizer, 2e-3 * warmup(step, 40) * linear_end(step / total))
        mine = torch.arange(rank, len(clean), ranks)
        noisy = (1 - mix) * clean + mix * noise
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            mine_tokens = {name: value[mine] for name, value in tokens.items()}
            velocity = model(noisy[mine], sigma[mine], mine_tokens, padded).float()
        loss = F.mse_loss(velocity, (noise - clean)[mine])
        update(loss, optimizers, list(model.parameters()))
        follow(average, model, step)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 and rank == 0:
            log(f"step {step} of {total}  {phase.frames} latents, {phase.size} px  {running:.4f}")
        if (step + 1) % 200 == 0 and rank == 0:
            save_checkpoint(checkpoint, step + 1, model, average, optimizers)
    if rank:
        return
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    save_model(model.text_encoder, work / "text_encoder")
    save_model(model.transformer, work / "denoiser")


def pack(work: Path, out: Path) -> None:
    """The whole pipeline, in half precision, as `WanPipeline.from_pretrained` reads it."""
    mean, std = latent_statistics(work)
    vae = AutoencoderKLWan.from_pretrained(work / "decoder")
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in std.tolist()],
    )
    pipe = WanPipeline(
        tokenizer=new_tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder"),
        vae=vae,
        transformer=WanTransformer3DModel.from_pretrained(work / "denoiser"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out)


def noise_levels(count: int, generator: torch.Generator, shift: float = SHIFT) -> Tensor:
    """As the scheduler spreads them: its first steps, above 0.9, settle where things move.

    One from each of `count` equal parts of the schedule, so that no batch lacks any of them.
    """
    time = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift * time / (1 + (shift - 1) * time)


def _caption(scene: Scene, generator: torch.Generator) -> str:
    """Mostly the whole caption; now and then none, for guidance, or the motion alone."""
    draw = torch.rand((), generator=generator).item()
    if draw < 0.1:
        return ""
    return anonymous_caption(scene) if draw < 0.22 else scene.caption


def _clips(batches: tuple, steps: int, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
    for step in range(steps):
        batch, frames, size = batches[step % len(batches)]
        generator = torch.Generator().manual_seed(seed + step)
        labels = torch.randint(len(SEEN), (batch,), generator=generator)
        scenes = [SEEN[i] for i in labels.tolist()]
        yield step, render(scenes, frames=frames, size=size, generator=generator)


def reconstruction_loss(output: Tensor, video: Tensor, is_object: Tensor) -> Tensor:
    """L1 and L2; the object counts five times the background, of which there is far more."""
    error = output - video
    return ((1 + 4 * is_object.float()) * (error.abs() + error.square())).mean()


def _is_object(video: Tensor) -> Tensor:
    return (video - (BACKGROUND / 127.5 - 1)).abs().amax(1, keepdim=True) > 0.1


def update(loss: Tensor, optimizers: list, parameters: list) -> None:
    loss.backward()
    if dist.is_initialized():
        _average([p.grad for p in parameters])
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def follow(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Move the running average of the weights after `step`."""
    keep = min(0.997, (step + 1) / (step + 20))
    with torch.no_grad():
        for name, p in model.named_parameters():
            average[name].lerp_(p, 1 - keep)


def _average(grads: list[Tensor]) -> None:
    """Over the processes, in place."""
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps)


def cosine(progress: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def linear_end(progress: float) -> float:
    """Constant for the first half, then down to 3 %."""
    return min(1.0, max(0.03, 2 * (1 - progress)))


def psnr(mse: float) -> float:
    return 10 * math.log10(4 / mse)


def save_model(model: ModelMixin | PreTrainedModel, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    model.save_pretrained(part)
    os.replace(part, path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)


def save_checkpoint(path: Path, step: int, model: nn.Module, average: dict, optimizers) -> None:
    """Everything that the next step depends on; the random draws depend on its number alone."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"average/{name}": p for name, p in average.items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{j}/{key}": value for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    save_tensors({k: v.contiguous().clone() for k, v in tensors.items()}, path)


def load_checkpoint(path: Path, model: nn.Module, average: dict, optimizers) -> int:
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model/{name}"])
            average[name].copy_(tensors[f"average/{name}"])
    for i, optimizer in enumerate(optimizers):
        full = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{i}/"):
                _, _, j, field = key.split("/")
                full["state"].setdefault(int(j), {})[field] = value
        optimizer.load_state_dict(full)
    return int(tensors["step"])


if __name__ == "__main__":
    main()
