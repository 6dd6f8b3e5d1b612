"""A stand-in of ComfyUI's MiniMax-H3 (comfy/ldm/minimax/model.py): its names of layers, its packed
sequence without a batch, and what it says in `transformer_options`, on parts of diffusers."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import (
    convert_minimax_h3_transformer_checkpoint_to_diffusers as convert,
)
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_minimax_h3 import (
    MiniMaxH3RotaryPosEmbed,
    _apply_rotary_emb,
)
from support.comfyui_host import optimized_attention
from support.tiny import minimax_h3 as tiny
from support.tiny.wan import noise
from torch import nn

SIGMA, SHIFTS = 0.7, (12.0, 3.0)  # of video and sound
GRID = (5, 8, 8)
KINDS = {"text": 1, "cond": 0, "ref_img": 0, "video": 0}  # tags; all others are sound, 2
# How the sequence is cut, the latents of what comes before the sound, and what ComfyUI cuts by.
LAYOUTS = {
    "text": (tiny.inputs, [("text", 9)], [], {}),
    "key frames": (
        tiny.key_inputs,
        [("text", 9), ("cond", 64), ("cond", 64)],
        [(1, 16, 16)] * 2,
        {"keyframes": [{"resolved_frame_index": i} for i in (0, 16)]},
    ),
    "references": (
        tiny.reference_inputs,
        [("text", 9), ("ref_img", 6), ("ref_audio", 6), ("ref_audio", 8), ("ref_img", 12)],
        [(1, 4, 6), (2, 6, 4)],
        {
            "refs": [
                {"kind": "image", "latent_h": 4, "latent_w": 6},
                {"kind": "audio", "ref_audio_t": 3},
                {
                    "kind": "video_audio",
                    "ref_audio_t": 4,
                    "latent_t": 2,
                    "latent_h": 6,
                    "latent_w": 4,
                },
            ]
        },
    ),
}


def sizes(config):
    """Arguments of ComfyUI's class."""
    names = {
        "hidden_size": "hidden_size",
        "num_layers": "num_layers",
        "token_refiner_num_layers": "num_refiner_layers",
        "num_attention_heads": "num_attention_heads",
        "attention_head_dim": "attention_head_dim",
        "ffn_hidden_size": "ffn_dim",
        "latents_dim": "in_channels",
        "audio_latents_dim": "audio_in_channels",
        "text_dim": "text_dim",
        "timestep_input_dim": "freq_dim",
        "time_embed_hidden_size": "time_embed_hidden_dim",
        "time_embed_dim": "time_embed_dim",
        "rope_inv_freq_len": "rope_freq_dim",
    }
    return {theirs: config[ours] for theirs, ours in names.items()}


def linear(inputs, outputs, bias=False):
    return nn.Linear(inputs, outputs, bias=bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, side = config.num_attention_heads, config.attention_head_dim
        self.qkv_proj = linear(config.hidden_size, 3 * self.heads * side)
        self.q_norm, self.k_norm = (nn.RMSNorm(side, eps=1e-5) for _ in range(2))
        self.out_proj = linear(self.heads * side, config.hidden_size)

    def forward(self, x, turned, transformer_options):
        q, k, v = (y.unflatten(1, (self.heads, -1)) for y in self.qkv_proj(x).chunk(3, 1))
        q, k = self.q_norm(q), self.k_norm(k)
        if turned is not None:
            q, k = (_apply_rotary_emb(y[None], *turned)[0] for y in (q, k))
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        options = {"skip_reshape": True, "transformer_options": transformer_options}
        return self.out_proj(optimized_attention(q, k, v, self.heads, mask=None, **options)[0])


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = linear(config.hidden_size, 2 * config.ffn_dim)
        self.fc2 = linear(config.ffn_dim, config.hidden_size)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, 1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config, parts=6):
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.attn, self.mlp = Attention(config), MLP(config)
        if parts:
            self.adaln_proj = nn.Module()
            self.adaln_proj.linear = linear(config.time_embed_dim, 3 * parts * width, bias=True)

    def forward(self, x, options, time=None, rows=None, turned=None):
        if time is None:
            x = x + self.attn(self.norm1(x), None, options)
            return x + self.mlp(self.norm2(x))
        said = self.adaln_proj.linear(F.silu(time)).view(3 * len(time), -1)[rows].chunk(6, 1)
        x = x + said[2] * self.attn(self.norm1(x) * (1 + said[1]) + said[0], turned, options)
        return x + said[5] * self.mlp(self.norm2(x) * (1 + said[4]) + said[3])


class MiniMaxH3Model(nn.Module):
    patch_size = tiny.PATCH

    def __init__(self, config):
        super().__init__()
        width, rows = config.hidden_size, 4 * config.in_channels
        self.video_patch_proj = linear(rows, width, bias=True)
        self.audio_patch_proj = linear(config.audio_in_channels, width, bias=True)
        self.condition_proj = linear(config.text_dim, width, bias=True)
        self.time = Timesteps(config.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = nn.Module()
        self.time_embedder.proj_in = linear(config.freq_dim, config.time_embed_hidden_dim, True)
        self.time_embedder.proj_out = linear(
            config.time_embed_hidden_dim, config.time_embed_dim, True
        )
        self.rope = MiniMaxH3RotaryPosEmbed(config.rope_freq_dim, config.rope_theta)
        self.token_refiner = nn.Module()
        self.token_refiner.blocks = nn.ModuleList(
            Block(config, 0) for _ in range(config.num_refiner_layers)
        )
        self.token_refiner.final_norm = nn.RMSNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = nn.Module()
        self.final_layer.norm = nn.RMSNorm(width, eps=1e-5)
        self.final_layer.adaln_proj = nn.Module()
        self.final_layer.adaln_proj.linear = linear(config.time_embed_dim, 2 * width, True)
        self.final_layer.video_out = linear(width, rows, True)
        self.final_layer.audio_out = linear(width, config.audio_in_channels, True)

    def forward(self, x, timestep, context, transformer_options=None, **given):
        payload, options = given["minimax_payload"], transformer_options
        layout = payload["layout"]
        options["minimax_h3_layout"] = layout
        levels, sort, kinds = told(layout.segments)
        text = self.condition_proj(context[0])
        for block in self.token_refiner.blocks:
            text = block(text, options)
        pictures = [*payload["cond_video_latents"], x[0]]
        sounds = [*payload["cond_audio_latents"], x[1]]
        hidden = torch.empty(layout.seq_len, text.shape[1])
        hidden[kinds == 1] = self.token_refiner.final_norm(text)
        hidden[kinds == 0] = self.video_patch_proj(torch.cat([tiny.rows(one) for one in pictures]))
        hidden[kinds == 2] = self.audio_patch_proj(
            torch.cat([one[0].flatten(1).T for one in sounds])
        )
        time = F.silu(self.time_embedder.proj_in(self.time(levels)))
        time = self.time_embedder.proj_out(time)
        for i, block in enumerate(self.blocks):
            options["block_index"] = i
            turned = self.rope(layout.position_ids)
            hidden = block(hidden, options, time, 3 * sort + kinds, turned)
        last = self.final_layer
        shift, scale = last.adaln_proj.linear(F.silu(time))[sort].chunk(2, 1)
        hidden = last.norm(hidden) * (1 + scale) + shift
        (a, b, _), (start, end, _) = layout.segments[-2:]
        frames, height, width = x[0].shape[2:]
        video = last.video_out(hidden[start:end]).view(frames, height // 2, width // 2, -1, 2, 2)
        video = video.permute(3, 0, 1, 4, 2, 5).reshape(x[0].shape)
        return [-video, -last.audio_out(hidden[a:b]).T.reshape(x[1].shape)]


def times():
    """Of video and of sound, 1 for clean."""
    base = SIGMA / (SHIFTS[0] + SIGMA * (1 - SHIFTS[0]))
    return 1 - SIGMA, 1 - SHIFTS[1] * base / (1 + (SHIFTS[1] - 1) * base)


def told(segments):
    """Times, and the number of its time and the tag for each token."""
    video, sound = times()
    each = {"text": video, "video": video, "audio": sound}
    of = torch.cat([torch.full((b - a,), each.get(kind, 1.0)) for a, b, kind in segments])
    tags = torch.cat([torch.full((b - a,), KINDS.get(kind, 2)) for a, b, kind in segments])
    return *of.unique(return_inverse=True), tags


def case(name, seed=0):
    """Arguments of a call of diffusers' model, and of one of ComfyUI's, for a sequence of
    `LAYOUTS`."""
    make, before, shapes, _ = LAYOUTS[name]
    given = make(*GRID, batch=1)
    segments, end = [], 0
    for kind, count in [*before, ("audio", 2 * tiny.SOUND), ("video", 320)]:
        segments.append((end, end + count, kind))
        end += count
    levels, sort, tags = told(segments)
    assert torch.equal(tags, given["token_tags"])
    shapes = [*shapes, (GRID[0], 2 * GRID[1], 2 * GRID[2])]
    pictures = [noise(1, tiny.CHANNELS, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
    spans = [(b - a) // 2 for a, b, kind in segments if "audio" in kind]
    sounds = [noise(1, tiny.SOUND_CHANNELS, 2, span, seed=9 + span) for span in spans]
    given |= {
        "hidden_states": torch.cat([tiny.rows(one) for one in pictures])[None],
        "audio_hidden_states": torch.cat([one[0].flatten(1).T for one in sounds])[None],
        "timestep": levels,
        "timestep_indices": sort,
    }
    layout = SimpleNamespace(
        segments=segments, seq_len=end, position_ids=given["position_ids"], signature=None
    )
    *seen, video = pictures
    *heard, sound = sounds
    payload = {"layout": layout, "cond_video_latents": seen, "cond_audio_latents": heard}
    return given, (video, sound, given["encoder_hidden_states"], payload)


def alike(model):
    """A stand-in, whose weights diffusers' model gets, as diffusers reads ComfyUI's file."""
    torch.manual_seed(4)
    network = MiniMaxH3Model(model.config).eval()
    state = {name: x.clone() for name, x in network.state_dict().items()}
    made = convert(state, None)
    model.load_state_dict(made)
    return network


def called(patched, video, sound, text, payload):
    """Rows of video and sound, as diffusers has them."""
    packed = torch.cat([video.flatten(), sound.flatten()]).view(1, 1, -1)
    shapes = [list(video.shape), list(sound.shape)]
    given = {"latent_shapes": shapes, "minimax_payload": payload}
    video, sound = patched.forward(packed, SIGMA, text, **given)
    return [-tiny.rows(video), -sound[0].flatten(1).T]
