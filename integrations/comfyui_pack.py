"""Write the help pages and the workflows of the ComfyUI pack.

python integrations/comfyui_pack.py

Help pages are made of the nodes' own descriptions and tooltips, so that none is missing. A
workflow is in the format of ComfyUI's frontend; `as_api` makes of it what /prompt takes.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACK = Path(__file__).parent / "comfyui"
MORE = {
    "GenAccelSparseAttention": """\
Put it between the model loader and the sampler, before or after a shift. The log lists after each
run how many attention calls were sparse, at which density, and how many were dense for which
reason.

| ComfyUI's Model Sparse Attention | here |
|---|---|
| `selection` | `method`: `sol-attn`, `sla`, `vsa` |
| `selection.tau`, `selection.keep_percent` | `tau`, `keep_percent` |
| all others | the same names |

| WanVideoSetRadialAttention | here, with `method` radial |
|---|---|
| `dense_timesteps`, `decay_factor`, `block_size` | the same names |
| `dense_blocks`, a number n | `dense_blocks` from 0 to n - 1, as in `0-3` |

`sol-attn` is the published rule in floating point, on any device and any head dim; ComfyUI's own
computes in 8 bits on CUDA. `vsa` is the fine part of VSA, the tiles of 4 x 4 x 4 tokens that score
best; Load Gates (gen_accel) adds its coarse part. `reuse` is dense in its
first sparse step, from which it learns.

With `min_tokens` at its default short clips stay dense: sparse attention gains nothing there.""",
    "GenAccelLoadLora": """\
Takes both forms of a LoRA of `gen-accel train`: the folder that the training wrote, copied into
`models/loras` (choose its `pytorch_lora_weights.safetensors`), or a single file of

```
gen-accel export outputs/lora/lora --out ComfyUI/models/loras/longer.safetensors
```

Other loaders load the exported file too, without its attention. A DoRA loads here from the folder
alone, and is computed as in training. `recipe` says what is left to the workflow: a cfg of 1 where
the LoRA holds its guidance, a first frame, the other expert's LoRA.""",
    "GenAccelLoadGates": """\
| file | what is loaded |
|---|---|
| FastWan, a model with `blocks.N.to_gate_compress`: the file of the model | its gates |
| FastH3 as a whole model, in ComfyUI 0.35 or later: its file | the model's own gates |
| FastH3 or another adapter (LoRA, `.diff`, `.diff_b`, `to_gate_compress.set_weight`) | all of it |

ComfyUI's own nodes leave the gates of such files out, with a line in the log. Here a file is used
whole or refused by the names without a place. `strength` weighs an adapter and its gates. Another
Sparse Attention (gen_accel) on the same model is refused, as it would not use them; take ComfyUI's
own Model Sparse Attention off MiniMax-H3 too. Gates read the hidden states of each block:
TorchCompileModel does not go with them. Served are Wan and its kin, without VACE, and MiniMax-H3
in ComfyUI 0.35 or later; an adapter needs one that is not pruned.""",
    "GenAccelPreset": """\
A tuned file is for one model, and for one number of steps; another number is refused with the
command that solves it again. Copy the JSON with all files of its name beside it.""",
    "GenAccelExtend": """\
| technique | models |
|---|---|
| `riflex`, `position_interpolation` | Wan, HunyuanVideo, Kandinsky 5 |
| `rotating_anchors`, `ultravico` | all whose tokens Sparse Attention (gen_accel) knows |

Not here: `continuation`, `fresh_noise` and `window_noise` of the library. The first two call the
whole sampling several times, the third changes its noise; a node for a model has no say in either.
ComfyUI's context windows are of that kind. LTX-Video (positions in seconds), Cosmos (frequencies
of its own scaling) and Mochi (learnt, each head its own) have no frequencies that a rule changes.

Techniques hold in sparse and in dense calls, in any order of nodes. `rotating_anchors` does not go
with methods that pool what they leave out (`piecewise`, `sol-attn`).""",
    "GenAccelEstimate": """\
Connect the model as the sampler gets it and the latent of the size to make; a Preview Any node
shows the text. A model of time, no measurement of your model:

```
speed-up = 1 / (1 - share x sparse x (1 - density / efficiency))
```

`share` is self-attention's part of the FLOPs, `sparse` the part of blocks and steps that are
sparse. Steps between `start_percent` and `end_percent` are counted as shares of the steps, which
a shift moves.""",
}
HOW = "Connect it to `custom_method` of Sparse Attention (gen_accel)."


def pack() -> Any:
    """The folder, imported as ComfyUI imports it, with no LoRAs and presets there."""
    name = "gen_accel_comfyui_pack"
    if name not in sys.modules:
        path = PACK / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.lora_nodes.lora_files = module.gate_nodes.weight_files = list
        module.preset_nodes.preset_folders = list
    return sys.modules[name]


def pages() -> dict[str, str]:
    """Help pages by the name of their node."""
    found = pack()
    names = found.NODE_DISPLAY_NAME_MAPPINGS
    return {key: page(key, names[key], kind) for key, kind in found.NODE_CLASS_MAPPINGS.items()}


def page(key: str, title: str, kind: Any) -> str:
    rows = ["| input | |", "|---|---|"]
    for inputs in kind.INPUT_TYPES().values():
        for name, (of_type, *about) in inputs.items():
            told = (about[0] if about else {}).get("tooltip", "")
            choices = ", ".join(f"`{one}`" for one in of_type) if isinstance(of_type, list) else ""
            said = " ".join(
                part for part in (told, f"One of {choices}." if choices else "") if part
            )
            rows.append(
                f"| `{name}` | {said or f'A link of type {of_type}.'} |".replace("\n", " ")
            )
    parts = [f"# {title}", kind.DESCRIPTION, "\n".join(rows)]
    if key in MORE:
        parts.append(MORE[key])
    else:  # a method: all that its class says
        text = inspect.cleandoc(kind.__doc__).partition("\nArgs:\n")[0]
        parts += [HOW, f"```text\n{text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


TEXT = {"text": "a fox runs through snow, tracking camera"}
AGAINST = {"text": "blurred, static, low quality, subtitles"}
WAN = {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}
WAN_I2V = {"unet_name": "wan2.1_i2v_480p_14B_fp16.safetensors", "weight_dtype": "default"}
UMT5 = {
    "clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "type": "wan",
    "device": "default",
}
VAE = {"vae_name": "wan_2.1_vae.safetensors"}
OUTPUTS = {
    "UNETLoader": ("MODEL",),
    "CLIPLoader": ("CLIP",),
    "VAELoader": ("VAE",),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyHunyuanLatentVideo": ("LATENT",),
    "ModelSamplingSD3": ("MODEL",),
    "KSampler": ("LATENT",),
    "VAEDecode": ("IMAGE",),
    "CreateVideo": ("VIDEO",),
    "SaveVideo": (),
    "PreviewAny": ("STRING",),
    "LoadImage": ("IMAGE", "MASK"),
    "WanImageToVideo": ("CONDITIONING", "CONDITIONING", "LATENT"),
}
CONTROL = {"KSampler": ("seed", "randomize")}  # the frontend's own widget, behind this one


class Graph:
    """A workflow, node by node."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, **inputs: Any) -> "Node":
        """A node; an input is the output of another, or a value."""
        known = pack().NODE_CLASS_MAPPINGS
        outputs = known[kind].RETURN_TYPES if kind in known else OUTPUTS[kind]
        values = {k: v for k, v in inputs.items() if not isinstance(v, SimpleNamespace)}
        if kind in known:
            values = _defaults(known[kind]) | values
        number = len(self.nodes) + 1
        slots = []
        for name, one in inputs.items():
            if isinstance(one, SimpleNamespace):
                link = len(self.links) + 1
                self.links.append([link, one.node, one.slot, number, len(slots), one.type])
                slots.append({"name": name, "type": one.type, "link": link})
                self.nodes[one.node - 1]["outputs"][one.slot]["links"].append(link)
        widgets = []
        for name, value in values.items():
            widgets.append(value)
            if CONTROL.get(kind, ("",))[0] == name:
                widgets.append(CONTROL[kind][1])
        column, row = divmod(number - 1, 4)
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [430 * column, 360 * row],
                "size": [400, 60 + 26 * (len(widgets) + len(slots))],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [{"name": one, "type": one, "links": []} for one in outputs],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets,
            }
        )
        return Node(number, outputs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


class Node:
    """Outputs of a node, by their places."""

    def __init__(self, number: int, types: tuple[str, ...]) -> None:
        self.number, self.types = number, types

    def __getitem__(self, slot: int) -> SimpleNamespace:
        return SimpleNamespace(node=self.number, slot=slot, type=self.types[slot])


def _defaults(kind: Any) -> dict[str, Any]:
    """Values of a node's widgets, in their order."""
    found = {}
    for inputs in kind.INPUT_TYPES().values():
        for name, (of_type, *about) in inputs.items():
            said = about[0] if about else {}
            if isinstance(of_type, list):
                found[name] = said.get("default", next(iter(of_type), ""))
            elif of_type in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                found[name] = said["default"]
    return found


def _sampled(graph: Graph, model: Node, latent: Any, prompts: tuple[Any, Any], vae: Node) -> None:
    shifted = graph.add("ModelSamplingSD3", model=model[0], shift=8.0)
    said = graph.add("GenAccelEstimate", model=shifted[0], latent=latent, steps=30)
    graph.add("PreviewAny", source=said[0])
    done = graph.add(
        "KSampler",
        **{"model": shifted[0], "positive": prompts[0], "negative": prompts[1]},
        latent_image=latent,
        **{"seed": 1, "steps": 30, "cfg": 6.0, "sampler_name": "uni_pc"},
        **{"scheduler": "simple", "denoise": 1.0},
    )
    frames = graph.add("VAEDecode", samples=done[0], vae=vae[0])
    film = graph.add("CreateVideo", images=frames[0], fps=16.0)
    graph.add(
        "SaveVideo", video=film[0], filename_prefix="video/gen_accel", format="auto", codec="auto"
    )


def _begun(graph: Graph, unet: Mapping[str, str]) -> tuple[Node, Node, Node, Node]:
    """Model, text and against it, and the autoencoder."""
    model = graph.add("UNETLoader", **unet)
    clip = graph.add("CLIPLoader", **UMT5)
    vae = graph.add("VAELoader", **VAE)
    positive, negative = (
        graph.add("CLIPTextEncode", clip=clip[0], **one) for one in (TEXT, AGAINST)
    )
    return model, positive, negative, vae


def _size(frames: int) -> dict[str, int]:
    return {"width": 832, "height": 480, "length": frames, "batch_size": 1}


def _from_text(frames: int, put_on: Callable[[Graph, Node], Node]) -> Graph:
    """A workflow of a text model, with nodes that `put_on` adds to the model."""
    graph = Graph()
    model, positive, negative, vae = _begun(graph, WAN)
    latent = graph.add("EmptyHunyuanLatentVideo", **_size(frames))
    patched = put_on(graph, model)
    _sampled(graph, patched, latent[0], (positive[0], negative[0]), vae)
    return graph


def text_to_video() -> Graph:
    def put_on(graph: Graph, model: Node) -> Node:
        given = {"method": "piecewise", "keep_percent": 20.0}
        return graph.add("GenAccelSparseAttention", model=model[0], **given)

    return _from_text(81, put_on)


def image_to_video() -> Graph:
    graph = Graph()
    model, positive, negative, vae = _begun(graph, WAN_I2V)
    image = graph.add("LoadImage", image="example.png", upload="image")
    given = graph.add(
        "WanImageToVideo",
        **{"positive": positive[0], "negative": negative[0], "vae": vae[0]},
        start_image=image[0],
        **_size(81),
    )
    method = graph.add("GenAccelRadial", decay_factor=0.5, anchor_every="8")
    sparse = graph.add("GenAccelSparseAttention", model=model[0], custom_method=method[0])
    _sampled(graph, sparse, given[2], (given[0], given[1]), vae)
    return graph


def longer_with_lora() -> Graph:
    def put_on(graph: Graph, model: Node) -> Node:
        lora = graph.add("GenAccelLoadLora", model=model[0], lora_name="longer.safetensors")
        graph.add("PreviewAny", source=lora[1])
        return lora

    return _from_text(161, put_on)


def longer_without_training() -> Graph:
    def put_on(graph: Graph, model: Node) -> Node:
        longer = graph.add("GenAccelExtend", model=model[0], technique="riflex", trained_frames=81)
        return graph.add("GenAccelPreset", model=longer[0], preset="balanced")

    return _from_text(161, put_on)


WORKFLOWS = {
    "Wan 2.1 text to video, sparse": text_to_video,
    "Wan 2.1 image to video, radial": image_to_video,
    "Wan 2.1 longer video with a LoRA": longer_with_lora,
    "Wan 2.1 longer video without training": longer_without_training,
}


def as_api(workflow: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Make of a workflow what POST /prompt takes, as the frontend does.

    Args:
        known: what /object_info says of the nodes.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        linked = {one["name"]: sources[one["link"]] for one in node["inputs"]}
        values, widgets = {}, iter(node["widgets_values"])
        for inputs in known[node["type"]]["input"].values():
            for name, (of_type, *about) in inputs.items():
                said = about[0] if about else {}
                plain = isinstance(of_type, list) or of_type in (
                    *("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"),
                )
                if not plain or said.get("forceInput") or name in linked:
                    continue
                value = next(widgets, said.get("default"))
                values[name] = value
                if said.get("control_after_generate") or said.get("image_upload"):
                    next(widgets, None)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | linked}
    return prompt


def files() -> dict[Path, str]:
    """Files to write, and their text."""
    found = {PACK / "web" / "docs" / f"{key}.md": text for key, text in pages().items()}
    for name, build in WORKFLOWS.items():
        text = json.dumps(build().to_dict(), indent=1) + "\n"
        found[PACK / "example_workflows" / f"{name}.json"] = text
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
