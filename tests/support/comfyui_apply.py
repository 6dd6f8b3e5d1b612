"""Run by ComfyUI's Python, in its folder: apply LoRAs to tiny models, and keep what they change.

python comfyui_apply.py BASE ROOT JOBS OUT: of each job in the JSON file JOBS, (kind, how, LoRA,
file), the weights and their changes, by the model's own names.
"""

import json
import logging
import sys
from pathlib import Path

base, root, jobs, out = sys.argv[1:]
sys.argv = ["apply", "--cpu", "--base-directory", base]
sys.path[:0] = [str(Path.cwd()), str(Path(root) / "tests")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support import comfyui_tiny as tiny  # noqa: E402
from support.comfyui_host import import_pack  # noqa: E402

pack = import_pack()
told: list[str] = []
logging.getLogger().addHandler(
    type("Kept", (logging.Handler,), {"emit": lambda s, r: told.append(r.getMessage())})()
)


def model_of(kind):
    if kind in tiny.BUILT:
        return tiny.Model().build(kind)[0]
    path = folder_paths.get_full_path_or_raise("diffusion_models", f"{kind}.safetensors")
    return comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})


def patched_by(how, model, lora):
    if how == "stock":
        tensors = comfy.utils.load_torch_file(lora, safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]
    pack.lora_nodes.lora_path = lambda name: lora
    return pack.lora_nodes.LoadLoraNode().load(model, lora, 1.0, attach_attention=False)[0]


for kind, how, lora, name in json.loads(Path(jobs).read_text()):
    model = model_of(kind)
    patched = patched_by(how, model, lora)
    before = model.model.state_dict()
    found = {}
    for key, patches in patched.patches.items():
        weight = before[key].float()
        after = comfy.lora.calculate_weight(patches, weight.clone(), key)
        own = key.removeprefix("diffusion_model.")
        found[f"before.{own}"] = weight.contiguous()
        found[f"change.{own}"] = (after - weight).contiguous()
    save_file(found, Path(out) / name)
(Path(out) / "log.json").write_text(json.dumps(told))
