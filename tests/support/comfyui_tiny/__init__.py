"""Nodes for the test in a real ComfyUI, which imports this folder as one of `custom_nodes`.

On import it writes tiny random checkpoints, in ComfyUI's own key layout, for every class of models
whose size ComfyUI reads from its checkpoint; the others it builds in a node.
"""

import json
import logging
from importlib import import_module
from pathlib import Path

import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import folder_paths
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from safetensors.torch import save_file

OVERRIDE = "optimized_attention_override"
WAN = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 3, "out_dim": 16}
STREAMS = {  # of HunyuanVideo and Flux: double blocks, then single ones
    "out_channels": 16,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
    "guidance_embed": True,
}
HUNYUAN = STREAMS | {
    "theta": 256,
    "patch_size": [1, 2, 2],
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
LTX = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 64,
    "num_layers": 3,
}
SOUND = {
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 32,
    "connector_num_layers": 1,
}
CHECKPOINTS = {  # of each: class, arguments, what its file's metadata says
    "wan_t2v": ("wan.model.WanModel", WAN | {"model_type": "t2v", "in_dim": 16}, None),
    "wan_i2v": ("wan.model.WanModel", WAN | {"model_type": "i2v", "in_dim": 36}, None),
    "wan_fun": (
        "wan.model.WanModel",
        WAN | {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        None,
    ),
    "wan_vace": (
        "wan.model.VaceWanModel",
        WAN | {"model_type": "vace", "in_dim": 16, "vace_layers": 1, "vace_in_dim": 96},
        None,
    ),
    "wan_animate": (
        "wan.model_animate.AnimateWanModel",
        WAN | {"model_type": "animate", "in_dim": 36, "num_layers": 5},
        None,
    ),
    "wan_scail": (
        "wan.model.SCAILWanModel",
        WAN | {"model_type": "scail", "in_dim": 20},
        None,
    ),
    "wan_s2v": ("wan.model.WanModel_S2V", WAN | {"model_type": "s2v", "in_dim": 16}, None),
    "wan_humo": ("wan.model.HumoWanModel", WAN | {"model_type": "humo", "in_dim": 16}, None),
    "hunyuan_video": (
        "hunyuan_video.model.HunyuanVideo",
        HUNYUAN | {"in_channels": 16, "vec_in_dim": 768},
        None,
    ),
    "hunyuan_video_15": (
        "hunyuan_video.model.HunyuanVideo",
        HUNYUAN
        | {"in_channels": 65, "out_channels": 32, "vec_in_dim": None, "vision_in_dim": 1152}
        | {"guidance_embed": False, "use_cond_type_embedding": True, "meanflow_sum": True},
        None,
    ),
    "ltx_video": ("lightricks.model.LTXVModel", LTX, LTX),
    "ltx_2": ("lightricks.av_model.LTXAVModel", LTX | SOUND, LTX | SOUND),
    "cosmos_predict2": (
        "cosmos.predict2.MiniTrainDIT",
        {
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 256,
            "pos_emb_cls": "rope3d",
            "use_adaln_lora": True,
        },
        None,
    ),
    "flux": (
        "flux.model.Flux",
        STREAMS
        | {"in_channels": 16, "vec_in_dim": 64, "theta": 10000, "patch_size": 2}
        | {"txt_ids_dims": []},
        None,
    ),
    "kandinsky_5": (
        "kandinsky5.model.Kandinsky5",
        {"model_dim": 128, "ff_dim": 256, "time_dim": 64, "num_visual_blocks": 3},
        None,
    ),
}
BUILT = {  # of each: class of its configuration, and that
    "mochi": (
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "num_heads": 2,
            "hidden_size_x": 256,
            "hidden_size_y": 128,
            "mlp_ratio_x": 48.0,
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "use_t5": True,
            "t5_feat_dim": 64,
            "timestep_scale": 1000.0,
        },
    ),
    "qwen_image": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 3,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
        },
    ),
    "hidream": (
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [64, 64],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [0, 1],
            "num_attention_heads": 2,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 1,
            "num_single_layers": 1,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 64,
        },
    ),
}
VIDEO = (16, 9, 12, 20)
IMAGE = (16, 36, 60)
LATENTS = {
    "flux": IMAGE,
    "hidream": IMAGE,
    "qwen_image": (16, 3, 20, 36),
    "mochi": (12, 9, 12, 20),
    "hunyuan_video_15": (32, 9, 12, 20),
    "ltx_video": (128, 9, 6, 10),
    "ltx_2": (128, 9, 6, 10),
}
TEXT = {"ltx_2": 128, "kandinsky_5": 3584, "cosmos_predict2": 1024}
POOLED = {
    "hunyuan_video": 768,
    "hunyuan_video_15": 768,
    "flux": 64,
    "kandinsky_5": 768,
    "hidream": 64,
}
TOKENS = 11


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(model):
    """Draw random weights, under which activations keep their size."""
    for i, (name, x) in enumerate(model.named_parameters()):
        if x.ndim > 1:
            x.data = drawn(*x.shape, seed=i) * x[0].numel() ** -0.5
        else:
            x.data = (0.0 if name.endswith("bias") else 1.0) + 0.1 * drawn(*x.shape, seed=i)


def write_checkpoints():
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (place, arguments, said) in CHECKPOINTS.items():
        module, _, name = place.rpartition(".")
        build = getattr(import_module(f"comfy.ldm.{module}"), name)
        if kind.startswith("wan"):
            arguments = arguments | {"text_dim": 4096}
        options = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
        model = build(**arguments, **options, device="cpu")
        fill(model)
        metadata = None if said is None else {"config": json.dumps({"transformer": said})}
        tensors = {key: x.contiguous() for key, x in model.state_dict().items()}
        save_file(tensors, folder / f"{kind}.safetensors", metadata)


class Model:
    """Model that no checkpoint of a small size stands for."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "build", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ([*BUILT],)}}

    def build(self, kind):
        name, arguments = BUILT[kind]
        config = getattr(comfy.supported_models, name)(dict(arguments))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        fill(model.diffusion_model)
        device = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(model, device, device),)


class Latent:
    """Zeros of a model's shape."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "make", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {}), "frames": ("INT", {"default": 0})}}

    def make(self, kind, frames):
        channels, *sides = LATENTS.get(kind, VIDEO)
        if frames:
            sides[0] = frames
        samples = torch.zeros(1, channels, *sides)
        if kind == "ltx_2":
            samples = NestedTensor([samples, torch.zeros(1, 8, 13, 16)])
        return ({"samples": samples},)


class Conditioning:
    """Random text of a model's width, and what else a name asks for."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        extra = ["", "hidden text", "phantom", "reference"]
        return {"required": {"kind": ("STRING", {}), "seed": ("INT", {}), "extra": (extra,)}}

    def make(self, kind, seed, extra):
        width = 4096 if kind.startswith("wan") else TEXT.get(kind, 64)
        text, said = drawn(1, TOKENS, width, seed=seed), {}
        if kind in POOLED:
            said["pooled_output"] = drawn(1, POOLED[kind], seed=seed + 1)
        if kind in ("ltx_video", "ltx_2", "mochi"):
            said["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
        if kind == "hidream":
            said["conditioning_llama3"] = drawn(1, 2, TOKENS, 64, seed=seed)
        if extra == "hidden text":
            said["attention_mask"] = (torch.arange(TOKENS) < 7).long()[None]
        elif extra == "phantom":
            said["time_dim_concat"] = drawn(1, 16, 4, 12, 20, seed=9)
        elif extra == "reference":
            image = LATENTS.get(kind, VIDEO)
            sides = image[1:] if len(image) == 3 else (1, *image[2:])
            said["reference_latents"] = [drawn(1, image[0], *sides, seed=9)]
        if kind == "wan_s2v":
            said["reference_motion"] = drawn(1, 16, 19, 12, 20, seed=8)
        if kind == "wan_scail":
            said["pose_video_latent"] = drawn(1, 16, 9, 6, 10, seed=8)
        return ([[text, said]],)


class OtherOverride:
    """Node that sets the override as a node for Sage attention does, and counts its calls."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        patched, calls = model.clone(), []

        def override(func, *args, **kwargs):
            calls.append(1)
            return func(*args, **kwargs)

        def report(patcher):
            logging.info("other override: %d calls", len(calls))
            calls.clear()

        patched.model_options["transformer_options"][OVERRIDE] = override
        patched.add_callback_with_key("on_cleanup", "other", report)
        return (patched,)


class Compile:
    """ComfyUI's TorchCompileModel with any backend."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tiny", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "backend": ("STRING", {"default": "eager"})}}

    def patch(self, model, backend):
        patched = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=patched, backend=backend, options=options)
        return (patched,)


write_checkpoints()
NODE_CLASS_MAPPINGS = {
    f"Tiny{kind.__name__}": kind for kind in (Model, Latent, Conditioning, OtherOverride, Compile)
}
