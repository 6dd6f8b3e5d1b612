"""Image models: Stable Diffusion 3, Qwen-Image, HiDream-I1, Z-Image, PixArt, HunyuanImage,
JoyImage Edit Plus, FLUX.1, 2 and 3, Krea 2."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    SEPARATE,
    STREAMS,
    Attention,
    Config,
    Family,
    Generation,
    Given,
    ImagePrompts,
)
from gen_accel.attention_processors.families.sites import (
    ImageAttention,
    ImageBranch,
    Model,
    SelfAttention,
    in_patches,
    outside_graphs,
    prefix_lengths,
    text_of_call,
    without_text,
)
from gen_accel.attention_processors.seam import add_tap
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.parsing import shown
from gen_accel.video import VideoShape

_CALL = "F.scaled_dot_product_attention"
_MLPS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class ImageFamily(Family):
    """A model of images, whose latents are (B, C, height, width)."""

    kind = "image"
    generation = Generation(axes="chw")


class StableDiffusion3(ImageFamily):
    """Image and text attend jointly, text last. In some layers of 3.5 Medium the image also
    attends to itself, in an attention of its own."""

    models = "Stable Diffusion 3, 3.5"
    order = "image, text"
    lora_targets = {"attention": JOINT, "feed_forward": BOTH_FEED_FORWARDS}
    attention = Attention(call=_CALL, text="after")

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites = []
        for site in super().self_attentions(transformer):
            sites.append(site)
            second = transformer.get_submodule(site.name).attn2
            if second is not None:
                name = f"{site.name}.attn2"
                sites.append(site._replace(name=name, module=second, tokens=without_text))
        return sites


class QwenImage(ImageFamily):
    """Image and text attend jointly, text first, its padding hidden by a mask; images that are
    edited come last. The layers of Qwen-Image-Layered are the frames of one grid, the first one
    the whole picture. The timestep is a thousandth of the scheduler's."""

    models = "Qwen-Image, Edit, Layered"
    order = "text, image, references"
    lora_targets = {
        "attention": JOINT,
        "feed_forward": _MLPS,
    }
    attention = Attention(text="before", masks="alike")

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """Grid of the generated images: the first of several images of a sample, and all layers
        but the last, which is the condition."""
        images = given["img_shapes"][0]
        if not isinstance(images, list):
            images = [images]
        frames, rows, columns = images[0]
        if transformer.config.use_layer3d_rope:
            frames = len(images) - 1
        before = self._beside(transformer, given)
        others = given["hidden_states"].shape[1] - frames * rows * columns
        return Tokens(VideoShape(frames, rows, columns, text=before + others), before)

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...] | None:
        """Number of text tokens in each sample, without padding; None with images to edit, which
        come behind the padding. Waits for the device."""
        mask, tokens = given["encoder_hidden_states_mask"], self.tokens(transformer, given)
        alone = tokens.video.text == tokens.before
        return prefix_lengths(mask) if mask is not None and alone else None


class HiDream(ImageFamily):
    """Image and text attend jointly, text last. The text comes from T5 and from two layers of
    Llama, of which the second changes from block to block. Images that are not square are filled
    up to the longest sequence that the model knows, with keys of zero which all see, as the model
    was trained. Blocks of two streams come first, then those of one."""

    models = "HiDream-I1"
    order = "image, filling, text"
    lora_targets = {
        "attention": (
            *("to_q", "to_k", "to_v", "to_out"),
            *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
        ),
        "feed_forward": ("w1", "w2", "w3"),
    }
    attention = Attention(
        call=_CALL,
        stacks=("double_stream_blocks", "single_stream_blocks"),
        name="block.attn1",
        text="after",
        timestep="timesteps",
    )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid; ValueError also for latents given as tokens, whose grid may differ between
        samples."""
        latents = given["hidden_states"]
        if latents.ndim != 4:
            raise ValueError(
                f"hidden_states must be (B, C, height, width) for {type(transformer).__name__} "
                f"with a method attached, got {tuple(latents.shape)}"
            )
        _, rows, columns = self._grid(transformer, latents)
        filling = 0 if rows == columns else transformer.max_seq - rows * columns
        text = given["encoder_hidden_states_t5"].shape[-2]
        text += 2 * given["encoder_hidden_states_llama3"].shape[-2]
        return Tokens(VideoShape(1, rows, columns, text=filling + text))


class ZImage(ImageFamily):
    """The image attends to itself in the first blocks, and then jointly with the text, which comes
    last. Image and text are each padded to a multiple of 32 tokens by learned tokens, which are
    seen. Padding to the longest text of a batch is hidden by a mask. The blocks of the text alone
    are left as they are. The timestep is 1 less a thousandth of the scheduler's."""

    models = "Z-Image"
    order = "image, filling, text"
    lora_targets = {
        "attention": SEPARATE,
        "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    }
    attention = Attention(text="after", timestep="t", rising=True)

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        heads = transformer.n_heads
        dim = transformer.dim // heads
        sites = [
            SelfAttention(f"{stack}.{place}", block.attention, place, heads, dim, tokens)
            for stack, tokens in (("noise_refiner", text_of_call), ("layers", None))
            for place, block in enumerate(getattr(transformer, stack))
        ]
        return [site._replace(layer=layer) for layer, site in enumerate(sites)]

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of latents (C, frames, height, width) each; ValueError also for samples of
        several images, or of different sizes."""
        x = given["x"]
        if isinstance(x[0], list) or any(image.shape != x[0].shape for image in x):
            raise ValueError(
                "x must be one latent of the same size for each sample with a method attached to "
                f"{type(transformer).__name__}: detach for several images, run other sizes apart"
            )
        side = given.get("patch_size", 2)
        grid = in_patches(x[0].shape[1:], (given.get("f_patch_size", 1), side, side))
        image = VideoShape(*grid)
        text = max(_filled(len(text)) for text in given["cap_feats"])
        return Tokens(VideoShape(*grid, text=_filled(image.tokens) - image.tokens + text))

    def text_lengths(self, transformer: Model, given: Given) -> tuple[int, ...]:
        """Number of text tokens in each sample, with the learned padding of image and text."""
        video = self.tokens(transformer, given).video
        image = _filled(video.video_tokens) - video.video_tokens
        return tuple(image + _filled(len(text)) for text in given["cap_feats"])


def _filled(tokens: int) -> int:
    """Number of tokens of an image or a text with its learned padding."""
    return -(-tokens // 32) * 32


class PixArt(ImageFamily):
    """Tokens are the image's alone, in raster order; text is seen by cross-attention."""

    models = "PixArt-alpha and PixArt-Sigma"
    order = "image"
    attention = Attention(call=_CALL, name="attn1")
    image_prompts = ImagePrompts(
        "batched", "transformer_blocks.attn2", "pixart", guided="do_classifier_free_guidance"
    )


class HunyuanImage(ImageFamily):
    """Image and text attend jointly, text last: that of the second encoder, which writes letters,
    then that of the first, and then the padding of both, hidden by a mask. The refiner of the
    text, which attends over it alone, is left as it is. Blocks of two streams come first, then
    those of one."""

    models = "HunyuanImage 2.1"
    order = "image, text"
    lora_targets = STREAMS
    attention = Attention(stacks=("transformer_blocks", "single_transformer_blocks"), text="after")

    def _grid(self, transformer: Model, latents: Tensor) -> tuple[int, int, int]:
        """Latents are (B, C, rows, columns), with frames before the rows for patches in time."""
        sides, patch = tuple(latents.shape[2:]), tuple(transformer.config.patch_size)
        return in_patches((1, *sides)[-3:], (1, *patch)[-3:])

    def _beside(self, transformer: Model, given: Given) -> int:
        second = given.get("encoder_hidden_states_2")
        if second is None or transformer.context_embedder_2 is None:
            return super()._beside(transformer, given)
        return super()._beside(transformer, given) + second.shape[1]


class JoyImageEditPlus(ImageFamily):
    """Image and text attend jointly: the image that is made, references, padding to the most
    patches of a sample, and text. A mask hides the padding of both."""

    models = "JoyImage Edit Plus"
    order = "image, references, padding, text"
    lora_targets = {
        "attention": ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj"),
        "feed_forward": _MLPS,
    }
    attention = Attention(stacks=("double_blocks",), text="after")

    def _heads(self, config: Config) -> tuple[int, int]:
        return config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the first shape of each sample; ValueError for samples of several sizes."""
        sizes = {tuple(shapes[0]) for shapes in given["shape_list"]}
        if len(sizes) > 1:
            raise ValueError(
                f"shape_list must begin with the same size for each sample with a method attached "
                f"to {type(transformer).__name__}, got {sorted(sizes)}: run other sizes apart"
            )
        frames, rows, columns = sizes.pop()
        others = given["hidden_states"].shape[1] - frames * rows * columns
        text = self._beside(transformer, given)
        return Tokens(VideoShape(frames, rows, columns, text=others + text))


class FluxBlocks(Family):
    """Image and text attend jointly, text first; images that are edited come last. Blocks of two
    streams come first, then those of one, and layers are counted through both. The timestep is a
    thousandth of the scheduler's."""

    order = "text, image, references"
    kind = "image"
    attention = Attention(
        stacks=("transformer_blocks", "single_transformer_blocks"), text="before"
    )

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the image, read from the positions of its tokens. Waits for the device."""
        rows, columns = _image_grid(given["img_ids"])
        before = self._beside(transformer, given)
        others = given["hidden_states"].shape[1] - rows * columns
        return Tokens(VideoShape(1, rows, columns, text=before + others), before)


@outside_graphs
def _image_grid(ids: Tensor) -> tuple[int, int]:
    """Rows and columns of the first image, from positions (N, 3 or more) or (B, N, 3 or more):
    which image, row, column. Positions may be scaled. Waits for the device.

    Raises ValueError if the first image is not number 0: VisualCloze begins with examples.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    first = (ids[:, 0] == ids[0, 0]).sum()
    columns = (ids[:, :2] == ids[0, :2]).all(1).sum()
    tokens, width, number = torch.stack([first, columns, ids[0, 0].long()]).tolist()
    if number:
        raise ValueError(
            f"img_ids must begin with image 0, the one that is made, got {number}: attach Dense() "
            "or detach for this pipeline"
        )
    return tokens // width, width


class Flux(FluxBlocks):
    """An image prompt is added where published adapters were trained for it: by the blocks of two
    streams, to what leaves the block, with the queries as they are before rotation."""

    models = "FLUX.1, Fill, Control, Kontext"
    lora_targets = STREAMS
    image_prompts = ImagePrompts("sequential", "transformer_blocks.attn", "flux")

    def tap_image(
        self, transformer: nn.Module, site: ImageAttention, add: ImageBranch
    ) -> Callable[[], None]:
        finish = partial(_third, add)
        call = self.attention.call
        return add_tap(site.module, call, finish, model=transformer, kind="finishes")


def _third(
    add: ImageBranch,
    result: tuple,
    attn: Model,
    hidden_states: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple:
    """Append a third result to the two of image and text; the block adds it ungated."""
    if not getattr(add, "acts", True):
        return result  # no need to compute queries
    q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)))
    added = add(q, slice(0, len(q)))
    if added is None:
        return result
    image, text, *before = result
    return image, text, sum(before, added.flatten(2).to(image.dtype))


class Flux2(FluxBlocks):
    """The attention of blocks of one stream projects together with the feed-forward."""

    models = "FLUX.2"
    lora_targets = {
        "attention": (*JOINT, "to_qkv_mlp_proj"),
        "feed_forward": (
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
        ),
    }

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the image. ValueError if keys of references are kept from step to step: then
        references see themselves alone, in attention calls of another kind."""
        if (mode := given.get("kv_cache_mode")) is not None:
            raise ValueError(
                f"kv_cache_mode must be None for {type(transformer).__name__} with a method "
                f"attached, got {shown(mode)}: detach, or use a pipeline that keeps no keys of "
                "references"
            )
        return super().tokens(transformer, given)


class Krea2(FluxBlocks):
    """One sequence of text and image. The text is padded before its last words, hidden by a mask.
    Its fusion, in which the layers of the text encoder and then the text attend to themselves, is
    left as it is. Key heads are repeated before the attention."""

    models = "Krea 2"
    order = "text, image"
    lora_targets = {
        "attention": (*SEPARATE, "to_gate"),
        "feed_forward": ("ff.gate", "ff.up", "ff.down"),
    }
    attention = Attention(text="before")

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        """The grid of the image, read from the positions behind the text's. Waits for the
        device."""
        before = self._beside(transformer, given)
        grid = 1, *_image_grid(given["position_ids"][before:])
        return Tokens(VideoShape(*grid, text=before), before)


class Flux3(FluxBlocks):
    """First blocks in which the image attends to itself, then blocks in which text, image and
    references attend jointly, in this order. The blocks of the text alone and of the references
    alone are left as they are."""

    models = "FLUX.3"
    order = "image, then text, image, references"
    lora_targets = {
        "attention": SEPARATE,
        "feed_forward": ("ff.linear_in", "ff.linear_out"),
    }
    attention = Attention(stacks=("mode_blocks.image", "single_transformer_blocks"), text="before")

    def self_attentions(self, transformer: Model) -> list[SelfAttention]:
        sites, alone = super().self_attentions(transformer), transformer.config.num_layers
        return [site._replace(tokens=without_text) for site in sites[:alone]] + sites[alone:]

    def tokens(self, transformer: Model, given: Given) -> Tokens:
        before = self._beside(transformer, given)
        references = given.get("image_cond_hidden_states")
        others = 0 if references is None else references.shape[1]
        grid = 1, *_image_grid(given["img_ids"])
        return Tokens(VideoShape(*grid, text=before + others), before)
