"""Cosmos: video alone in self-attention, with two ways to tell the time and two processors.

Without the mask of padded pixels among the channels, which takes torchvision, and with pipelines
that find everything safe: NVIDIA's checker is a package of its own.
"""

from functools import partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from support import hunyuan, wan
from support.image_models import noise
from support.tiny import Case, Training
from torch import Tensor, nn

CHANNELS, HEADS, HEAD_DIM = 4, 2, 16
IMAGE_TOKENS, IMAGE_WIDTH = 3, 6


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": wan.TEXT_WIDTH,
        "adaln_lora_dim": 8,
        "max_size": (8, 32, 32),
        "concat_padding_mask": False,
    }
    return CosmosTransformer3DModel(**(tiny | config)).eval()


def predict() -> Any:
    """Which frames are given is one more channel."""
    return transformer(in_channels=CHANNELS + 1, extra_pos_embed_type=None)


def transfer() -> Any:
    return transformer(
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * wan.TEXT_WIDTH,
        encoder_hidden_states_channels=wan.TEXT_WIDTH,
        controlnet_block_every_n=1,
        img_context_dim_in=IMAGE_WIDTH,
        img_context_num_tokens=IMAGE_TOKENS,
        img_context_dim_out=HEADS * HEAD_DIM,
    )


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, CHANNELS, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, 5, wan.TEXT_WIDTH, seed=2),
        "fps": 30,
    }


def predict_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """The first frame is given."""
    given = inputs(frames, height, width, **options)
    times = given["timestep"].view(-1, 1, 1, 1, 1).repeat(1, 1, frames, 1, 1)
    times[:, :, 0] = 0.1
    shown = torch.zeros_like(given["hidden_states"][:, :1])
    shown[:, :, 0] = 1
    return given | {"timestep": times, "condition_mask": shown}


def transfer_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = inputs(frames, height, width, **options)
    batch = len(given["timestep"])
    text = noise(batch, 5, 2 * wan.TEXT_WIDTH, seed=2)
    image = noise(batch, IMAGE_TOKENS, IMAGE_WIDTH, seed=3)
    control = noise(batch, frames * height * width, HEADS * HEAD_DIM, seed=4)
    return given | {
        "encoder_hidden_states": (text, image),
        "block_controlnet_hidden_states": [control, 0.1 * control],
    }


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1


def row(given: Any, number: int) -> Any:
    if isinstance(given, dict):
        return {name: row(value, number) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(row(value, number) for value in given)
    return given[number : number + 1] if isinstance(given, Tensor) else given


class Unchecked(nn.Module):
    """In the place of the safety checker."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class Control(nn.Module):
    """In the place of the controlnet: it controls nothing."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, latents: Tensor, **given: Any) -> tuple[list[Tensor]]:
        batch, _, frames, height, width = latents.shape
        tokens = frames * (height // 2) * (width // 2)
        return ([torch.zeros(batch, tokens, HEADS * HEAD_DIM)] * 2,)


def pipeline(kind: type, **more: Any) -> Any:
    """Of Predict2.5 or Transfer2.5."""
    config = {"controlnet_block_every_n": 1} if more else {}
    model = transformer(
        in_channels=wan.CHANNELS + 1,
        out_channels=wan.CHANNELS,
        extra_pos_embed_type=None,
        **config,
    )
    parts = {"vae": wan.autoencoder(), "scheduler": wan.unipc(), "safety_checker": Unchecked()}
    texts = {"text_encoder": None, "tokenizer": None}
    pipe: Any = kind(transformer=model, **parts, **texts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **more: Any) -> Tensor:
    if isinstance(pipe, Cosmos2_5_TransferPipeline):  # two chunks
        more = {"controls": [noise(17, 3, 48, 64).sigmoid()], "num_frames_per_chunk": 9}
    else:
        more = {"num_frames": 9}
    made = pipe(
        prompt_embeds=noise(1, 5, wan.TEXT_WIDTH, seed=6),
        negative_prompt_embeds=noise(1, 5, wan.TEXT_WIDTH, seed=7),
        height=48,
        width=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **more,
    )
    return made.frames


CASES = [
    Case("cosmos", transformer, inputs, poke),
    Case(
        "cosmos_predict",
        predict,
        predict_inputs,
        poke,
        pipeline=partial(pipeline, Cosmos2_5_PredictBasePipeline),
        generate=generate,
    ),
    Case(
        "cosmos_transfer",
        transfer,
        transfer_inputs,
        poke,
        row=row,
        pipeline=lambda: pipeline(Cosmos2_5_TransferPipeline, controlnet=Control()),
        generate=generate,
    ),
]

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'][0]['text'] }} {% endfor %}"


def predict25() -> Any:
    """Predict2.5 with a text encoder, all of whose layers it takes."""
    llama, _ = hunyuan.text_encoders()
    width = llama.config.num_hidden_layers * hunyuan.TEXT_WIDTH
    model = transformer(
        in_channels=wan.CHANNELS + 1,
        out_channels=wan.CHANNELS,
        extra_pos_embed_type=None,
        concat_padding_mask=True,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=width,
        encoder_hidden_states_channels=wan.TEXT_WIDTH,
    )
    tokenizer = new_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipe: Any = Cosmos2_5_PredictBasePipeline(
        transformer=model,
        vae=wan.autoencoder(),
        scheduler=wan.unipc(),
        safety_checker=Unchecked(),  # pyright: ignore[reportArgumentType]
        text_encoder=llama,  # pyright: ignore[reportArgumentType]
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predict2() -> Any:
    """Predict2, from a first frame."""
    model = transformer(
        in_channels=wan.CHANNELS + 1,
        out_channels=wan.CHANNELS,
        extra_pos_embed_type=None,
        concat_padding_mask=True,
    )
    pipe: Any = Cosmos2VideoToWorldPipeline(
        transformer=model,
        vae=wan.autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Unchecked(),  # pyright: ignore[reportArgumentType]
        text_encoder=wan.text_encoder(),  # pyright: ignore[reportArgumentType]
        tokenizer=new_tokenizer(),  # pyright: ignore[reportArgumentType]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


TRAINING = [
    Training(
        "cosmos25",
        predict25,
        (9, 32, 48),
        {"guidance_scale": 1.0, "max_sequence_length": 40},
        tokens=40,  # the template comes first
        level=lambda timestep: timestep[:, 0, 0, 0, 0].double(),
    )
]
