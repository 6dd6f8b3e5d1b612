"""LoRAs in a real ComfyUI: each weight of its models changes as the weight of diffusers' does.

It runs where COMFYUI_DIR names a checkout of ComfyUI, by the Python of COMFYUI_PYTHON.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.exported import READERS, lora_of, model_of_family
from support.paths import ROOT

from gen_accel.lora import export

COMFYUI = os.environ.get("COMFYUI_DIR")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI"),
]
WIDE = {"num_attention_heads": 2, "attention_head_dim": 128}
NARROW = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3}
SOUND = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 16}
BOTH = ("attention", "feed_forward")
# Of ComfyUI's tiny models: the family, its config in diffusers, and what the LoRA is on. Mochi's
# feed-forward layers are rounded otherwise at this size.
KINDS = {
    "wan_t2v": ("wan", WIDE | {"ffn_dim": 256, "num_layers": 3}, BOTH),
    "hunyuan_video": (
        "hunyuan_video",
        WIDE | {"num_layers": 2, "num_single_layers": 2, "rope_axes_dim": (16, 56, 56)},
        BOTH,
    ),
    "hunyuan_video_15": (
        "hunyuan_video15",
        WIDE | {"num_layers": 2, "rope_axes_dim": (16, 56, 56)},
        BOTH,
    ),
    "ltx_video": ("ltx", NARROW | {"cross_attention_dim": 64}, BOTH),
    "ltx_2": (
        "ltx2",
        NARROW | SOUND | {"cross_attention_dim": 64, "audio_cross_attention_dim": 32},
        BOTH,
    ),
    "cosmos_predict2": (
        "cosmos",
        {"num_attention_heads": 16, "attention_head_dim": 16, "text_embed_dim": 1024},
        BOTH,
    ),
    "kandinsky_5": (
        "kandinsky5",
        {"model_dim": 128, "ff_dim": 256, "num_visual_blocks": 3, "axes_dims": (16, 24, 24)},
        BOTH,
    ),
    "mochi": ("mochi", WIDE | {"num_layers": 2, "pooled_projection_dim": 128}, ("attention",)),
}
NODE, STOCK = "node", "stock"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Transformers with a LoRA, and what ComfyUI made of it: by kind, and by who loaded it."""
    base = tmp_path_factory.mktemp("comfyui_loras")
    for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / folder).mkdir()
    models, jobs = {}, []
    for kind, (family, config, targets) in KINDS.items():
        models[kind] = model_of_family(family, **config)
        folder = lora_of(models[kind], base / kind, alpha=3.0, targets=targets)
        export(folder, base / f"{kind}.safetensors")
        jobs.append((kind, STOCK, str(base / f"{kind}.safetensors"), f"{kind}.{STOCK}"))
        jobs.append((kind, NODE, str(folder), f"{kind}.{NODE}"))
    family, config, targets = KINDS["wan_t2v"]
    models["dora"] = model_of_family(family, **config)
    folder = lora_of(models["dora"], base / "dora", alpha=3.0, targets=targets, dora=True)
    jobs.append(("wan_t2v", NODE, str(folder), f"dora.{NODE}"))
    (base / "jobs.json").write_text(json.dumps(jobs))
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable)]
    command += [ROOT / "tests" / "support" / "comfyui_apply.py", base, ROOT]
    command += [base / "jobs.json", base]
    where = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=COMFYUI, env=where, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return models, base


def part(tensors, name):
    return {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}


@pytest.mark.parametrize("by", [STOCK, NODE])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_changes_comfyui_s_weights_as_diffusers(made, kind, by):
    models, base = made
    found = READERS[KINDS[kind][0]](part(load_file(base / f"{kind}.{by}"), "change"))
    layers = {n: m for n, m in models[kind].named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) > 5
    for name, layer in layers.items():
        exact = layer.get_delta_weight("default")
        torch.testing.assert_close(found.pop(f"{name}.weight"), exact, atol=2e-5, rtol=1e-5)
    assert [name for name, x in found.items() if x.any()] == []


def test_comfyui_passes_no_tensor_of_a_file_over(made):
    _, base = made
    told = json.loads((base / "log.json").read_text())
    assert [line for line in told if "not loaded" in line.lower()] == []


def test_a_dora_is_as_peft_merges_it(made):
    """On the weights of ComfyUI's model."""
    models, base = made
    tensors = load_file(base / f"dora.{NODE}")
    before, change = (READERS["wan"](part(tensors, name)) for name in ("before", "change"))
    model = deepcopy(models["dora"])
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight.data = before[f"{name}.weight"].clone()
            layer.merge()
            merged = layer.get_base_layer().weight
            torch.testing.assert_close(
                merged - before[f"{name}.weight"], change[f"{name}.weight"], atol=2e-5, rtol=1e-4
            )
            assert change[f"{name}.weight"].abs().max() > 0.01
