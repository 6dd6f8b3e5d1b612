"""Image models in small: Stable Diffusion 3, Qwen-Image, HiDream-I1, Z-Image and PixArt."""

from gen_accel.attention_processors.families.base import (
    BOTH_FEED_FORWARDS,
    JOINT,
    SEPARATE,
    Attention,
    Family,
    Generation,
    Given,
    ImagePrompts,
)
from gen_accel.attention_processors.families.sites import (
    Model,
    SelfAttention,
    in_patches,
    prefix_lengths,
    without_text,
)
from gen_accel.attention_processors.seam import Call
from gen_accel.attention_processors.tokens import Tokens
from gen_accel.video import VideoShape

_CALL = "F.scaled_dot_product_attention"


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
        "feed_forward": (
            *("img_mlp.net.0.proj", "img_mlp.net.2"),
            *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
        ),
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
        mask, (video, before) = (
            given["encoder_hidden_states_mask"],
            self.tokens(transformer, given),
        )
        return None if mask is None or video.text != before else prefix_lengths(mask)


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
            for stack, tokens in (("noise_refiner", _image), ("layers", None))
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


def _image(tokens: Tokens, call: Call) -> Tokens:
    grid = tokens.video.grid
    return Tokens(VideoShape(*grid, text=call.k.shape[1] - tokens.video.video_tokens))


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
