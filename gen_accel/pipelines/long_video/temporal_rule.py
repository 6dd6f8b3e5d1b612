"""A rule on the rotary frequencies of the time axis, kept on live transformers."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen_accel.attention_processors.families import argument_names, by_name, family_for

# own frequencies (pairs,) in rad a latent frame, frames, trained -> the frequencies to use
Frequencies = Callable[[Tensor, int, int], Tensor]


class TemporalRule:
    """Rule on the temporal rotary frequencies of forward passes longer than `trained`.

    Such a pass uses `frequencies(own, frames, trained)`; other passes use the model's own
    frequencies, bit for bit. Take the rule off by `remove()`, or by leaving its `with`. Lengths
    are in latent frames after patchify.

    Args:
        frequencies: function that makes the frequencies; None changes nothing.
        frames: least length to make frequencies for; a longer live grid counts with its own
            length. A model tuned under a rule thus keeps its frequencies on shorter grids.

    Raises ValueError for lengths below 1, a class that no family serves, a compiled transformer,
    or a transformer that has a rule already.
    """

    def __init__(
        self,
        transformers: Mapping[str, nn.Module],
        frequencies: Frequencies | None,
        *,
        frames: int,
        trained: int,
    ) -> None:
        for name, value in (("frames", frames), ("trained", trained)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._handles: list[tuple[nn.Module, _Hook, RemovableHandle]] = []
        if frequencies is None:
            return
        for name, transformer in transformers.items():
            compiled = getattr(transformer, "_compiled_call_impl", None) is not None
            if compiled or hasattr(transformer, "_orig_mod"):  # compiled blocks notice a new hook
                raise ValueError(
                    f"{name} is compiled already; load it again, extend, and compile then"
                )
            if any(isinstance(hook, _Hook) for hook in transformer._forward_pre_hooks.values()):
                raise ValueError(f"{name} has a rule on its frequencies already: remove it first")
        hooks = [_Hook(module, frequencies, frames, trained) for module in transformers.values()]
        for hook, transformer in zip(hooks, transformers.values(), strict=True):
            handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
            self._handles.append((transformer, hook, handle))

    def remove(self) -> None:
        """Take the rule off. Does nothing the second time."""
        for transformer, hook, handle in self._handles:
            handle.remove()
            hook.off(transformer)
        self._handles = []

    def __enter__(self) -> "TemporalRule":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Hook:
    def __init__(
        self, transformer: nn.Module, frequencies: Frequencies, frames: int, trained: int
    ) -> None:
        family = family_for(transformer, "rules on rotary frequencies")
        self._family, self._names = family, argument_names(type(transformer))
        self._own = family.temporal_frequencies(transformer)
        self._passed = family.serves("passed rotary tables")
        self._frequencies, self._frames, self._trained = frequencies, frames, trained
        self._length: int | None = None  # length of the present table; None: the model's own
        self._removed = False

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self._removed:
            return None
        given = by_name(self._names, args, kwargs)
        live = self._family.tokens(transformer, given).video.frames
        length = max(self._frames, live) if live > self._trained else None
        if not self._passed:
            self._to(transformer, length)
            return None
        if length is None:
            return None
        made = self._frequencies(self._own, length, self._trained)
        return (), self._family.with_temporal_frequencies(transformer, made, given)

    def off(self, transformer: nn.Module) -> None:
        if not self._passed:
            self._to(transformer, None)
        self._removed = True  # a graph compiled with the hook goes on calling the hook

    def _to(self, transformer: nn.Module, length: int | None) -> None:
        if length == self._length:
            return
        made = self._frequencies(self._own, length, self._trained) if length else None
        self._family.set_temporal_frequencies(transformer, made)
        self._length = length
