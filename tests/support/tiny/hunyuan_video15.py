"""HunyuanVideo 1.5: video and texts of three kinds, each with its padding, in one attention."""

from functools import cache, partial
from typing import Any

import torch
from demo_model.train import new_tokenizer
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from support import wan
from support.tiny import Case, Training
from support.tiny.wan import noise
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

CHANNELS = 4
TEXT, TEXT_WIDTH = 9, 8
GLYPHS, GLYPHS_WIDTH = 5, 6
IMAGE, IMAGE_WIDTH = 4, 10
SIZE = 64  # pixels of a side that the pipeline chooses where it is given an image


def transformer(**config: Any) -> Any:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_WIDTH,
        "text_embed_2_dim": GLYPHS_WIDTH,
        "image_embed_dim": IMAGE_WIDTH,
        "rope_axes_dim": (4, 6, 6),
        "target_size": SIZE,
    }
    return HunyuanVideo15Transformer3DModel(**(tiny | config)).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 2,
    lengths: tuple[int, ...] | None = None,
    time: float = 700.0,
) -> dict[str, Any]:
    """Of text to video."""
    lengths = (TEXT,) * batch if lengths is None else lengths
    return {
        "hidden_states": noise(batch, 2 * CHANNELS + 1, frames, height, width),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH, seed=3),
        "encoder_attention_mask": seen(TEXT, lengths),
        "encoder_hidden_states_2": noise(batch, GLYPHS, GLYPHS_WIDTH, seed=4),
        "encoder_attention_mask_2": seen(GLYPHS, glyphs(lengths)),
        "image_embeds": torch.zeros(batch, IMAGE, IMAGE_WIDTH),
    }


def image_inputs(frames: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    given = inputs(frames, height, width, **options)
    return given | {"image_embeds": noise(*given["image_embeds"].shape, seed=5)}


def glyphs(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """In the first prompt there are none."""
    return tuple(0 if row == 0 else GLYPHS - 1 for row in range(len(lengths)))


def seen(text: int, lengths: tuple[int, ...]) -> Tensor:
    return (torch.arange(text) < torch.tensor(lengths)[:, None]).long()


def poke(given: dict[str, Any], frame: int, row: int, column: int) -> None:
    given["hidden_states"][0, :, frame, row, column] += 1


def padding(given: dict[str, Any], lengths: tuple[int, int]) -> None:
    for row, (length, others) in enumerate(zip(lengths, glyphs(lengths), strict=True)):
        given["encoder_hidden_states"][row, length:] += 1
        given["encoder_hidden_states_2"][row, others:] += 1


@cache
def autoencoder() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(2)
    widths: Any = (8, 8, 8, 8, 8)
    return AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=widths, layers_per_block=1
    ).eval()


def pipeline(kind: type = HunyuanVideo15Pipeline, **parts: Any) -> Any:
    """Without what makes embeddings of a prompt."""
    others = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe: Any = kind(
        transformer=transformer(),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        **dict.fromkeys(others),
        **parts,
    )
    pipe.vision_num_semantic_tokens = IMAGE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_pipeline() -> Any:
    torch.manual_seed(4)
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    size = {"height": 32, "width": 32}
    return pipeline(
        HunyuanVideo15ImageToVideoPipeline,
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size=size),
    )


def generate(pipe: Any, **options: Any) -> Tensor:
    """With the glyphs of the prompt, and none in the negative prompt."""
    made = pipe(
        prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=6),
        prompt_embeds_mask=seen(TEXT, (7,)),
        negative_prompt_embeds=noise(1, TEXT, TEXT_WIDTH, seed=7),
        negative_prompt_embeds_mask=seen(TEXT, (3,)),
        prompt_embeds_2=noise(1, GLYPHS, GLYPHS_WIDTH, seed=8),
        prompt_embeds_mask_2=seen(GLYPHS, (3,)),
        negative_prompt_embeds_2=torch.zeros(1, GLYPHS, GLYPHS_WIDTH),
        negative_prompt_embeds_mask_2=seen(GLYPHS, (0,)),
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **options,
    )
    return made.frames


CASES = [
    Case(
        "hunyuan_video15",
        transformer,
        inputs,
        poke,
        lengths=(7, 2),
        padding=padding,
        pipeline=pipeline,
        generate=partial(generate, height=80, width=112),
    ),
    Case(
        "hunyuan_video15_image",
        transformer,
        image_inputs,
        poke,
        lengths=(7, 2),
        padding=padding,
        pipeline=image_pipeline,
        generate=partial(generate, image=wan.picture(0)),
    ),
]

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} "
    "{% endfor %}assistant"
)


def training() -> Any:
    """From text to video with both text encoders, without guidance."""
    torch.manual_seed(3)
    words = Qwen2_5_VLTextConfig(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    glyphs = T5Config(
        vocab_size=384, d_model=GLYPHS_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    tokenizer = new_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipe: Any = HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(words).eval(),
        tokenizer=tokenizer,
        transformer=transformer(task_type="t2v"),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(glyphs).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=1.0, enabled=False),
    )
    pipe.system_message = "a red square"
    pipe.prompt_template_encode_start_idx = 5
    pipe.tokenizer_max_length = 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def beside_nothing(latents: Tensor) -> Tensor:
    """Without the given frames and their mask."""
    zeros = torch.zeros_like(latents)
    return torch.cat([latents, zeros, zeros[:, :1]], 1)


TRAINING = [Training("hunyuan_video15", training, (9, 64, 96), fed=beside_nothing)]
