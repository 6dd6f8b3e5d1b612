"""Weights of a tiny Wan pipeline in the names of the original model, as ComfyUI has them."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file
from support import wan
from torch import Tensor

TRANSFORMER, VAE, TEXT = "wan_fp16.safetensors", "wan_vae.safetensors", "umt5.safetensors"
ENDS = ("weight", "bias", "gamma")
_ATTENTION = [f"{a}_attn.{x}" for a in ("self", "cross") for x in ("q", "k", "v", "o", "norm_q")]
_LAYERS = [*_ATTENTION, "self_attn.norm_k", "cross_attn.norm_k", "norm3", "ffn.0", "ffn.2"]
_TOP = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0"]
_TOP += ["time_embedding.2", "time_projection.1", "head.head"]
_UNITS = [f"residual.{i}" for i in (0, 2, 3, 6)] + ["shortcut", "resample.1", "time_conv"]
_MIDDLE = [f"middle.{i}.residual.{j}" for i, j in product((0, 2), (0, 2, 3, 6))]
_MIDDLE += ["middle.1.norm", "middle.1.to_qkv", "middle.1.proj", "head.0", "head.2", "conv1"]


def _blocks(count: int) -> list[str]:
    layers = [f"blocks.{i}.{name}" for i, name in product(range(count), _LAYERS)]
    names = [f"{name}.{end}" for name, end in product([*layers, *_TOP], ENDS[:2])]
    return [*names, *(f"blocks.{i}.modulation" for i in range(count)), "head.modulation"]


def _stages() -> list[str]:
    layers = [f"{side}.{name}" for side, name in product(("encoder", "decoder"), _MIDDLE)]
    ways = ("encoder.downsamples", "decoder.upsamples")
    layers += [f"{way}.{i}.{unit}" for way, i, unit in product(ways, range(15), _UNITS)]
    return [f"{name}.{end}" for name, end in product([*layers, "conv1", "conv2"], ENDS)]


def original(
    state: Mapping[str, Tensor], convert: Callable[..., dict[str, Any]], names: Iterable[str]
) -> dict[str, Tensor]:
    """Give tensors the names that diffusers brings to theirs."""
    back = convert(checkpoint={name: name for name in names})
    return {back[key]: x.clone() for key, x in state.items()}


def transformer_state(model: torch.nn.Module) -> dict[str, Tensor]:
    names = _blocks(wan.LAYERS)
    return original(model.state_dict(), convert_wan_transformer_to_diffusers, names)


def wan_t5_state(model: Any) -> dict[str, Tensor]:
    """In the names of Wan's own encoder."""
    back = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
    block = {
        "layer.0.layer_norm": "norm1",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        **{f"layer.0.SelfAttention.{x}": f"attn.{x}" for x in "qkvo"},
    }
    for i in range(model.config.num_layers):
        back |= {f"encoder.block.{i}.{k}": f"blocks.{i}.{v}" for k, v in block.items()}
    state = {k: x for k, x in model.state_dict().items() if not k.startswith("encoder.embed")}
    return {f"{back[k.removesuffix('.weight')]}.weight": x.clone() for k, x in state.items()}


def autoencoder() -> AutoencoderKLWan:
    """With as many blocks in a stage as diffusers' names of a single file have."""
    torch.manual_seed(2)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=wan.CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    ).eval()


def write(folder: Path) -> Path:
    """Write a pipeline as diffusers saves it, `folder`/model, and its parts as single files."""
    pipe = wan.pipeline(vae=autoencoder())
    pipe.save_pretrained(folder / "model")
    save_file(transformer_state(pipe.transformer), folder / TRANSFORMER)
    vae = original(pipe.vae.state_dict(), convert_wan_vae_to_diffusers, _stages())
    save_file(vae, folder / VAE)
    save_file(wan_t5_state(pipe.text_encoder), folder / TEXT)
    return folder


def write_gguf(model: torch.nn.Module, path: Path) -> Path:
    """Write a transformer with the matrices of its blocks in 8 bits."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "wan")
    for key, x in transformer_state(model).items():
        low = x.ndim == 2 and key.startswith("blocks.")
        kind = gguf.GGMLQuantizationType.Q8_0 if low else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file in float32."""
    from gguf import GGUFReader, quants

    found = {}
    for one in GGUFReader(path).tensors:
        values = torch.from_numpy(quants.dequantize(one.data, one.tensor_type).copy())
        found[one.name] = values.reshape(*map(int, reversed(one.shape)))
    return found
