"""Run by ComfyUI's Python, in its folder: a tiny Wan of ComfyUI's with gates of a file.

python comfyui_gated.py ROOT FOLDER: FOLDER has the model, the gates and the arguments of a call,
as safetensors, and gets its output.
"""

import sys
from pathlib import Path

root, folder = sys.argv[1:]
sys.argv = ["gated", "--cpu"]
sys.path[:0] = [str(Path.cwd()), str(Path(root) / "tests")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.comfyui_host import Adapter, Weighted, import_pack  # noqa: E402

home = Path(folder)
state, given = (load_file(home / f"{name}.safetensors") for name in ("model", "given"))
dim, text = state["text_embedding.2.weight"].shape[0], state["text_embedding.0.weight"].shape[1]
model = WanModel(
    model_type="t2v",
    dim=dim,
    text_dim=text,
    ffn_dim=len(state["blocks.0.ffn.0.weight"]),
    freq_dim=state["time_embedding.0.weight"].shape[1],
    num_heads=int(given.pop("heads")),
    num_layers=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
    dtype=torch.float32,
    device="cpu",
    operations=comfy.ops.disable_weight_init,
).eval()
model.load_state_dict(state)
for number, block in enumerate(model.blocks):  # versions before 0.19 do not say it

    def say(module, args, options, number=number):
        options["transformer_options"]["block_index"] = number

    block.register_forward_pre_hook(say, with_kwargs=True)
pack = import_pack()
pack.gate_nodes.weight_path = lambda name: home / name
pack.gate_nodes.lora_adapter = lambda: Adapter
plain = Weighted(model)
[patched] = pack.gate_nodes.LoadGatesNode().load(plain, "fastwan.safetensors", 1.0, 30.0)
with torch.no_grad():
    found = {}
    for name, one in (("gated", patched), ("dense", plain)):
        call = one.model.apply_model

        def timed(x, t, *rest, call=call, **more):
            return call(x, given["timestep"], *rest, **more)

        one.model.apply_model = timed
        found[name] = one.forward(given["latents"], context=given["context"]).contiguous()
        one.model.apply_model = call
save_file(found, home / "out.safetensors")
