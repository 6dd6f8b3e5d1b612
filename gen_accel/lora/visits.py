"""Models of a pipeline that come to the device for a validation video, and go back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gen_accel.pipelines.generation.decode import is_streamed

Run = Callable[..., Any]


@contextmanager
def sampling_on(
    device: torch.device,
    pipe: Any,
    trained: Sequence[nn.Module],
    *,
    prompt: Mapping[str, Tensor] | None,
    run: Run | None = None,
    is_given: bool = False,
) -> Iterator[Run]:
    """Yield what `sample` calls in place of the pipeline.

    The autoencoder comes to the device when the last step is done. All else that the pipeline
    has comes at once. Both go back to where they were at the end.

    Args:
        trained: the transformers that train, which the training brings to the device.
        prompt: what the pipeline takes in place of the text; None encodes the text there.
        run: called in place of the pipeline.
        is_given: whether the pipeline also encodes pictures, and so needs the autoencoder.
    """
    encodes = is_given or not is_streamed(pipe)
    models = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and all(part is not one for one in trained)
    }
    with ExitStack() as stack:
        for name, model in models.items():
            if name != "vae" or encodes:
                stack.enter_context(_moved(model, device))
        told = None if prompt is None else {name: x.to(device) for name, x in prompt.items()}

        def denoise(**given: Any) -> Any:
            if told is not None:
                given = {k: v for k, v in given.items() if k not in ("prompt", _negative(told))}
                given |= told
            if encodes:
                return (run or pipe)(**given)
            vae = pipe.vae
            # A pipeline runs on the device of its first model.
            object.__setattr__(pipe, "vae", None)
            try:
                made = (run or pipe)(**given)
            finally:
                object.__setattr__(pipe, "vae", vae)
            stack.enter_context(_moved(vae, device))
            return made

        yield denoise


def _negative(told: Mapping[str, Tensor]) -> str | None:
    """Name of the argument that encoded negative prompts replace."""
    return "negative_prompt" if any(name.startswith("negative_") for name in told) else None


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
