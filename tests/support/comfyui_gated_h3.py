"""Run by ComfyUI's Python, in its folder: a tiny MiniMax-H3 of ComfyUI's with gates of a file.

python comfyui_gated_h3.py ROOT FOLDER: FOLDER has the model, the gates, its sizes and the
arguments of calls, and gets their outputs.
"""

import json
import sys
from pathlib import Path

root, folder = sys.argv[1:]
sys.argv = ["gated", "--cpu"]
sys.path[:0] = [str(Path.cwd()), str(Path(root) / "tests")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.minimax.model as theirs  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.comfyui_host import Adapter, Unpacked, Weighted, import_pack  # noqa: E402

home = Path(folder)
sizes = json.loads((home / "sizes.json").read_text())
model = (
    theirs.MiniMaxH3Model(
        **sizes, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    .eval()
    .requires_grad_(False)
)
model.load_state_dict(load_file(home / "model.safetensors"))
layouts = []


class Layout(theirs.PackedLayout):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        layouts.append(self)


theirs.PackedLayout = Layout
for number, block in enumerate(model.blocks):  # versions before 0.35 say neither

    def say(module, args, options, number=number):
        options["transformer_options"] |= {"block_index": number, "minimax_h3_layout": layouts[-1]}

    block.register_forward_pre_hook(say, with_kwargs=True)
pack = import_pack()
pack.gate_nodes.weight_path = lambda name: home / name
pack.gate_nodes.lora_adapter = lambda: Adapter
plain = Weighted(model, Unpacked)
[patched] = pack.gate_nodes.LoadGatesNode().load(plain, "fasth3.safetensors", 1.0, 30.0)
found = {}
for name, payload in json.loads((home / "calls.json").read_text()).items():
    given = load_file(home / f"{name}.safetensors")
    for kind in ("video", "audio"):
        payload[f"cond_{kind}_latents"] = [given[x] for x in sorted(given) if x.startswith(kind)]
    for frame, latent in zip(
        payload.get("keyframes", ()), payload["cond_video_latents"], strict=False
    ):
        frame["latent"] = latent
    payload["visual_cond_noise_aug"] = 1.0
    packed = torch.cat([given["x"].flatten(), given["sound"].flatten()]).view(1, 1, -1)
    shapes = [list(given[x].shape) for x in ("x", "sound")]
    options = {"latent_shapes": shapes, "minimax_payload": payload}
    for kind, one in (("gated", patched), ("dense", plain)):
        with torch.no_grad():
            video, sound = one.forward(
                packed.clone(), float(given["sigma"]), given["text"], **options
            )
        found |= {f"{name}.{kind}.0": video.contiguous(), f"{name}.{kind}.1": sound.contiguous()}
save_file(found, home / "out.safetensors")
