"""Images through the encoder of the pipeline or of the adapter."""

import pytest
import torch
from support import image_adapters
from support.image_prompts import (
    TOKENS,
    Projector,
    noise,
)
from torch import nn

from gen_accel import load_image_prompt
from gen_accel.attention_processors.image_prompt import (
    new_adapter,
)


def linear_of(embedding):
    """A projector of an encoder's embeddings."""
    made = Projector(image_adapters.CROSS)
    made.proj = nn.Linear(embedding, TOKENS * made.width)
    return made


@torch.no_grad()
def test_images_go_through_the_encoder_of_the_pipeline():
    pipe = image_adapters.pipeline("sd")
    made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
    prompt = load_image_prompt(pipe, made)
    picture = image_adapters.picture()
    with pytest.raises(FileNotFoundError, match="no image at nowhere"):
        prompt.set_image("nowhere.png")
    for image in (picture, [picture, picture]):
        prompt.set_image(image, negative=picture)
        assert torch.isfinite(image_adapters.generate(pipe, "sd")).all()
    prompt.set_image(picture)
    base = image_adapters.generate(pipe, "sd")
    prompt.remove()
    assert torch.equal(image_adapters.generate(pipe, "sd"), base)  # which it started from


@torch.no_grad()
@pytest.mark.slow
def test_the_encoder_that_the_adapter_names(tmp_path):
    image_adapters.vision().save_pretrained(tmp_path)
    image_adapters.extractor().save_pretrained(tmp_path)
    picture, seen = image_adapters.picture(), {}

    def shown(pipe, **options):
        made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
        made.layers["1"].to_v.weight.mul_(2)
        made.metadata["image_encoder"] = str(tmp_path)
        with load_image_prompt(pipe, made, **options) as prompt:
            prompt.set_image(picture)
            return image_adapters.generate(pipe, "sd")

    own = image_adapters.vision(seed=8)  # gives features that mean nothing to the adapter
    for name, kept in (("named", None), ("own", own)):
        pipe = image_adapters.pipeline("sd")
        pipe.image_encoder = kept
        seen[name] = shown(pipe)
        seen[f"{name}, given"] = shown(pipe, image_encoder=tmp_path)
        assert pipe.image_encoder is kept
    assert torch.equal(seen["named"], seen["named, given"])
    assert torch.equal(seen["named"], seen["own, given"])
    assert torch.equal(seen["named"], seen["own"])


@torch.no_grad()
def test_an_encoder_that_is_gone_is_not_needed_for_embeddings(tmp_path):
    pipe = image_adapters.pipeline("sd")
    pipe.image_encoder = None
    made = new_adapter(pipe.unet, linear_of(image_adapters.EMBEDDING), variant="base")
    made.metadata["image_encoder"] = str(tmp_path / "gone")
    prompt = load_image_prompt(pipe, made)
    prompt.set_embeds(noise(1, image_adapters.EMBEDDING))
    assert torch.isfinite(image_adapters.generate(pipe, "sd")).all()
    with pytest.raises(ValueError, match=r"no CLIP vision model at .*gone"):
        prompt.set_image(image_adapters.picture())
