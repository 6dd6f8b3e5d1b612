"""Image-prompt adapters with random weights for any model, and what they leave behind."""

import torch
from torch import nn

from gen_accel.attention_processors.families import family_for
from gen_accel.attention_processors.image_prompt import (
    ImageAdapter,
    new_adapter,
)

WIDTH = 5  # of a feature


TOKENS = 3


class Projector(nn.Module):
    """As the base adapters', of features (I, 5)."""

    def __init__(self, width, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.tokens, self.width = TOKENS, width
        self.proj = nn.Linear(WIDTH, TOKENS * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features):
        return self.norm(self.proj(features).unflatten(-1, (TOKENS, self.width)))

    def null(self, features):
        return torch.zeros_like(features)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sites(model):
    return family_for(model, "image prompts").image_attentions(model)


def identity(model, seed=0):
    projector = Projector(sites(model)[0].width, seed)
    return new_adapter(model, projector, variant="base")


def adapter(model, seed=0):
    """One that does something."""
    made = identity(model, seed)
    made = ImageAdapter("base", made.projector, dict(made.layers), key_norm=made.key_norm)
    torch.manual_seed(seed + 1)
    for parameter in made.layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.requires_grad_(False)


def added(model, run, place=0):
    """What the first attention puts into its output projection."""
    seen = []
    projection = sites(model)[place].module.to_out[0]
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    run()
    hook.remove()
    return seen[-1]


def trace(model):
    """All that could be left behind."""
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return processors, [*dict(model.named_modules())], hooks, model.__dict__.get("forward")


def assert_as_before(model, before):
    now = trace(model)
    assert all(a is b for a, b in zip(now[0], before[0], strict=True))
    assert now[1:] == before[1:]
