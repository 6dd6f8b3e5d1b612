"""Techniques for longer video, laid over attached methods."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from gen_accel.attention_processors.attached.attachment import Attachment, put_on
from gen_accel.attention_processors.attached.extension import AttentionExtension, no_graph
from gen_accel.attention_processors.attached.transformers import served_transformers
from gen_accel.attention_processors.families import family_of
from gen_accel.attention_processors.methods.dense import Full
from gen_accel.attention_processors.seam import (
    SparseProcessor,
    is_compiled,
)


def extend_attention(
    pipe_or_transformer: Any, extension: AttentionExtension
) -> Callable[[], None]:
    """Lay `extension` over all attached methods, now or later, until the returned function is
    called.

    Where nothing is attached, full attention replaces the model's own until the extension is
    removed. A method that is attached meanwhile takes the extension over; when the method is
    detached, the extension stays.

    Raises:
        ValueError: an extension of that name is on; a compiled transformer with nothing attached,
            or with an extension that differs from step to step.
    """
    transformers = served_transformers(pipe_or_transformer)
    for name, module in transformers.items():
        if extension.needs_step and is_compiled(module):
            raise ValueError(no_graph(extension) + f", and {name} is compiled already")
    attached = {name: owners_of(module) for name, module in transformers.items()}
    for owner in [owner for owners in attached.values() for owner in owners]:
        if extension.name in {other.name for other in owner.extensions}:
            raise ValueError(f"{extension.name} is on already: remove it first")
    free = {name: transformers[name] for name, owners in attached.items() if not owners}
    if free:
        whole = len(free) == len(transformers)
        for module in [pipe_or_transformer] if whole else free.values():
            put_on(module, Full())
    owners = [owner for module in transformers.values() for owner in owners_of(module)]
    for owner in dict.fromkeys(owners):
        owner.extensions = (*owner.extensions, extension)

    def remove() -> None:
        found = [owner for module in transformers.values() for owner in owners_of(module)]
        for owner in dict.fromkeys(found):
            owner.extensions = tuple(e for e in owner.extensions if e is not extension)
            if owner.stands_in and not owner.extensions:
                owner.detach()

    return remove


def owners_of(transformer: nn.Module) -> list["Attachment"]:
    """List the attachments of a transformer, each once."""
    sites = family_of(transformer).self_attentions(transformer)
    found = [site.module.processor for site in sites]
    owners = [x.owner for x in found if isinstance(x, SparseProcessor)]
    return list(dict.fromkeys(owner for owner in owners if owner.is_attached))


@contextmanager
def one_generation(pipe: Any) -> Iterator[None]:
    """Enter `Attachment.gathering` of all attachments of a pipeline."""
    with ExitStack() as stack:
        for module in served_transformers(pipe).values():
            for owner in owners_of(module):
                stack.enter_context(owner.gathering())
        yield
