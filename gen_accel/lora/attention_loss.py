"""What an image adds to each attention, held to what words would have added there.

An image prompt adds A(q, image) to the attention to a caption that leaves open what is shown,
Attn(q, K, V). With K*, V* of a caption that says it, each attention is asked by itself for

    A(q, image) = Attn(q, K*, V*) - Attn(q, K, V)

at the queries q that the model has under the image prompt, after the output projection. Gradients
do not run from one attention to another nor through the rest of the model, so that a step costs
little more than a forward pass, and what makes little difference to the prediction in the end is
not lost on the way.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import family_for, image_family_of

TEXT = "encoder_hidden_states"  # as attentions call their text


def text_attentions(transformer: nn.Module) -> list[nn.Module]:
    """Raises ValueError where video and text attend jointly: what the text gives is no output of
    its own there."""
    order = family_for(transformer, "training").ORDER
    if order != "video":
        raise ValueError(
            "objective distill_attention compares attentions to the text alone, and those of "
            f"{type(transformer).__name__} are over {order}: take objective distill"
        )
    family = image_family_of(transformer)
    return [site.module for site in family.image_attentions(transformer)]


class AttentionLoss:
    """Raises ValueError as `text_attentions` does."""

    def __init__(self, transformer: nn.Module) -> None:
        self._attentions = text_attentions(transformer)

    def __call__(self, student: Callable[[], Any], teacher: Callable[[], Any]) -> Tensor:
        """Squared error of the attentions' outputs by the square of what they are to be, both
        summed over the batch; the mean of all attentions.

        Args:
            student: runs the model on the caption and the image.
            teacher: runs it without the image on the caption that says what that shows, and
                without gradients; on any video, as the text's tokens do not depend on it.
        """
        calls: dict[nn.Module, inspect.BoundArguments] = {}
        given: dict[nn.Module, Tensor] = {}
        wanted: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
            calls[module], given[module] = _bound(module, args, kwargs), out
            return out.detach()

        def compare(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
            call = calls[module]
            call.arguments[TEXT] = _bound(module, args, kwargs).arguments[TEXT]
            wanted[module] = module.forward(*call.args, **call.kwargs)

        with self._hooked(keep):
            student()
        with self._hooked(compare):
            teacher()
        errors = [
            F.mse_loss(given[one].float(), out.float()) / out.float().square().mean()
            for one, out in wanted.items()
        ]
        return sum(errors[1:], errors[0]) / len(errors)

    @contextmanager
    def _hooked(self, hook: Callable) -> Iterator[None]:
        with ExitStack() as stack:
            for attention in self._attentions:
                handle = attention.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    return inspect.signature(module.forward).bind(*args, **kwargs)
