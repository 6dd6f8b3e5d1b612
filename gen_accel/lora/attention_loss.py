"""Loss of an image prompt at each attention: the image must add what a full caption would add.

The image prompt adds A(q, image) to Attn(q, K, V), the attention to a caption that does not
describe the image. With K*, V* of a caption that does, each attention is trained by itself to

    A(q, image) = Attn(q, K*, V*) - Attn(q, K, V)

at the queries q that the model has under the image prompt, after the output projection. Gradients
do not flow from one attention to another or through the rest of the model. A step therefore costs
little more than a forward pass, and attentions with little effect on the prediction learn too.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gen_accel.attention_processors.families import family_for, image_family_of

TEXT = "encoder_hidden_states"  # name of the text among an attention's arguments


def text_attentions(transformer: nn.Module) -> list[nn.Module]:
    """Return the model's attentions to the text.

    Raises ValueError if video and text attend jointly, as the text then has no separate output.
    """
    order = family_for(transformer, "training").ORDER
    if order != "video":
        raise ValueError(
            "objective distill_attention compares attentions to the text alone, and those of "
            f"{type(transformer).__name__} are over {order}: take objective distill"
        )
    family = image_family_of(transformer)
    return [site.module for site in family.image_attentions(transformer)]


class AttentionLoss:
    """The loss of one model. Raises ValueError as `text_attentions` does."""

    def __init__(self, transformer: nn.Module) -> None:
        self._attentions = text_attentions(transformer)

    def __call__(self, student: Callable[[], Any], teacher: Callable[[], Any]) -> Tensor:
        """Compute the relative squared error of the attentions' outputs, averaged over attentions.

        Error and target are both summed over the batch before the division.

        Args:
            student: runs the model on the caption and the image.
            teacher: runs the model without gradients and without the image, on the caption that
                describes the image. Any video will do, as the text's tokens do not depend on it.
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
