"""Adapters that train on a model: a LoRA, or the layers that read an image prompt."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_accel import demo
from gen_accel.attention_processors.attached.attachment import Attachment
from gen_accel.attention_processors.attached.recipe import Recipe, check_base, parse
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.storage import save_processors
from gen_accel.attention_processors.families.weights import block_names
from gen_accel.io import check_finite
from gen_accel.lora.artefact import (
    TEACHER,
    add_lora,
    add_teacher,
    check_guidance,
    load_branches,
    load_into,
    lora_state,
    teacher_attention,
    write_lora,
)
from gen_accel.lora.batches import Adapter, Draw, captioned
from gen_accel.lora.caching.inputs import ImageCoder
from gen_accel.lora.caching.latents import LatentCache, as_features
from gen_accel.lora.config import CAUSAL, TrainConfig
from gen_accel.lora.data.clips import open_image
from gen_accel.lora.model import ModelToTrain
from gen_accel.lora.publish import CARD, card_for
from gen_accel.paths import expanded
from gen_accel.registry import needed_for

with needed_for("a LoRA", extra="train"):
    from peft.tuners.tuners_utils import BaseTunerLayer

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from gen_accel.attention_processors.image_prompt import ImageAdapter
    from gen_accel.pipelines.image_prompt.formats import AdapterFile

Write = Callable[[Path], object]  # takes a folder


class Lora(Adapter):
    """A LoRA on the transformer, and the parameters of the attached method.

    Args:
        handle: handle of the attached method.
    """

    FOLDER = "lora"

    def __init__(
        self, config: TrainConfig, model: ModelToTrain, handle: Attachment, recipe: Recipe
    ) -> None:
        super().__init__()
        self._transformer, self._handle, self._recipe = model.transformer, handle, recipe
        self._is_on = bool(config.rank)
        self._shares = config.context_parallel > 1
        self._chunks = config.objective == CAUSAL  # which a teacher's attention sees too
        taught_by = None
        check_guidance(config, model.transformer, model.boundary)
        if config.rank:
            add_lora(model.transformer, config, recipe)
            if config.init_lora is not None:
                load_into(model.transformer, config.init_lora, config)
        if config.teacher_lora is not None:
            taught_by = add_teacher(model.transformer, config, model.trained_frames)
        self._teacher = None if taught_by is None else TEACHER
        method, schedule = teacher_attention(config, taught_by)
        device = next(model.transformer.parameters()).device
        self._attention = method.for_device(device), schedule
        if config.init_lora is not None:
            load_branches(handle.branches, config.init_lora)
        for branch in handle.branches.values():  # after PEFT, which freezes all but its own
            branch.requires_grad_(config.train_processors)

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Run the original model, or the model with `teacher_lora`, through the teacher's
        attention."""
        with self._attending(), active(self._transformer, self._teacher):
            yield

    def _attending(self) -> AbstractContextManager[None]:
        """Run the teacher's attention; a dense one over the tokens of all processes that share a
        clip."""
        handle, (method, schedule) = self._handle, self._attention
        if not method.is_dense or self._chunks:
            return handle.running(method, schedule)
        if not self._shares:
            return handle.paused()
        return handle.scheduled(Schedule(dense_layers=len(block_names(self._transformer))))

    def writer(self, whole: Callable[[Tensor], Tensor]) -> Write:
        state, branches = {}, self._handle.branches
        if self._is_on:
            state = {n: whole(x).clone() for n, x in lora_state(self._transformer).items()}
        processors = None
        if branches:
            kept = {
                layer: {n: whole(x).clone() for n, x in branch.state_dict().items()}
                for layer, branch in branches.items()
            }
            processors = partial(save_processors, self._handle, tensors=kept)
        recipe, transformer = self._recipe, self._transformer
        return partial(
            write_lora, transformer=transformer, state=state, processors=processors, recipe=recipe
        )


class ImagePromptAdapter(Adapter):
    """Added layers that read an image, and the projector that turns the image into tokens.

    The model and the method's parameters stay frozen. At the first step the adapter changes
    nothing: see `start` of `ImageAdapter`.

    Args:
        cache: source of the images; their features set the shape that the adapter reads.
    """

    FOLDER = "image_prompt"

    def __init__(
        self,
        config: TrainConfig,
        model: ModelToTrain,
        handle: Attachment,
        recipe: Recipe,
        cache: LatentCache,
    ) -> None:
        from gen_accel.pipelines.image_prompt import load_image_prompt
        from gen_accel.pipelines.image_prompt.formats import base_of

        super().__init__()
        for branch in handle.branches.values():
            branch.requires_grad_(False)
        self._handle, self._config, self._cache = handle, config, cache
        self._coder = ImageCoder.of(config)
        self._of_files: dict[int, Tensor] = {}
        self.adapter = _adapter(config, model.transformer, cache)
        size, encoder = {"image_size": config.image_size}, {"image_encoder": config.image_encoder}
        self._about = {
            **base_of(model.transformer, [*self.adapter.layers]),
            **(size if config.image_encoder is None else encoder),
            "recipe": recipe.to_dict(),
        }
        self._recipe = recipe
        # Without weights: the training weights may be sharded over several processes.
        self._hollow = deepcopy(self.adapter).to("meta")
        target = model.transformer if model.pipe is None else model.pipe
        part = None if model.pipe is None else recipe.part
        self._prompt = load_image_prompt(target, self.adapter, part=part)
        self.modules["image_adapter"] = self.adapter

    def inputs(
        self, cache: LatentCache, clips: Sequence[int], draws: Sequence[Draw]
    ) -> tuple[Tensor]:
        """Stack the features of the clips' images, or the stand-in for no image."""
        shown = [
            cache.image(clip) if drawn.pictured else cache.no_image
            for clip, drawn in zip(clips, draws, strict=True)
        ]
        return (torch.stack(shown),)

    def teacher_conditions(
        self, cache: LatentCache, clips: Sequence[int], draws: Sequence[Draw]
    ) -> list[dict[str, Tensor]]:
        """Return the teacher's conditions: its caption for each clip whose image is shown."""
        return [
            cache.teacher(clip) if drawn.pictured else captioned(cache, clip, drawn)
            for clip, drawn in zip(clips, draws, strict=True)
        ]

    def showing(self, *inputs: Tensor) -> AbstractContextManager[object]:
        return self._prompt.using(*inputs)

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Run the model with dense attention and without the image."""
        with self._handle.paused(), self._prompt.paused():
            yield

    @contextmanager
    def sampling(self, index: int) -> Iterator[None]:
        """Show the validation video's own image.

        The image is set each time, as the average of the weights is swapped in and out.
        """
        device = next(self.adapter.parameters()).device
        features = self._of_validation(index).to(device)
        nothing = self._cache.no_image[None].to(device)
        self._prompt.set_embeds(features, negative=nothing)
        yield

    def writer(self, whole: Callable[[Tensor], Tensor]) -> Write:
        from gen_accel.pipelines.image_prompt.formats import write_adapter

        state = {name: whole(x).clone() for name, x in self.adapter.state_dict().items()}
        made = deepcopy(self._hollow)
        made.load_state_dict(state, assign=True)
        about, recipe = self._about, self._recipe

        def write(folder: Path) -> Path:
            check_finite(state, f"the image prompt for {folder}")
            card = card_for(folder, recipe, image=True)
            return write_adapter(folder, made, about, beside={CARD: card})

        return write

    def _of_validation(self, index: int) -> Tensor:
        """Return the features of a validation image, (1, ...)."""
        files = self._config.validation_images
        if not files:
            return self._cache.image(index % len(self._cache))[None]
        if index not in self._of_files:
            file = expanded(files[index])
            found = self._coder(open_image(file.read_bytes(), file))
            self._of_files[index] = as_features(found)[None]
        return self._of_files[index]


@contextmanager
def active(transformer: nn.Module, adapter: str | None) -> Iterator[None]:
    """Activate another adapter, or none, inside the context.

    PEFT's own methods are not used: they change `requires_grad`, and under FSDP they change it on
    temporary tensors.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        layer._active_adapter = [adapter] if adapter is not None else layer._active_adapter
    try:
        yield
    finally:
        for layer, (name, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = name, disabled


def fields_of_lora(config: TrainConfig) -> dict[str, Any]:
    """Return a recipe's fields of the LoRA; rank 0 for an image prompt."""
    if config.adapter != "lora":
        return {"rank": 0, "alpha": 0.0, "targets": ()}
    return {
        "rank": config.rank,
        "alpha": float(config.lora_alpha),
        "targets": config.targets,
        "lora_kind": config.lora_kind,
        "dora": config.dora,
        "rank_stabilised": config.rank_stabilised,
    }


def read_start(config: TrainConfig, transformer: "ModelMixin") -> "AdapterFile":
    """Read `init_adapter`, which must be of this model and of the config's kind."""
    from gen_accel.pipelines.image_prompt.formats import find_adapter, read_adapter

    source = config.init_adapter
    assert source is not None
    found = read_adapter(find_adapter(demo.adapter_named(source)))
    if "recipe" in found.metadata:
        check_base(parse(found.metadata["recipe"], source), transformer, "the adapter")
    asked = ImageCoder.of(config).variant
    if found.variant != asked:
        raise ValueError(
            f"init_adapter {source} is of kind {found.variant!r}, asked for is {asked!r}"
        )
    return found


def _adapter(config: TrainConfig, transformer: "ModelMixin", cache: LatentCache) -> "ImageAdapter":
    from gen_accel.attention_processors.families import family_for
    from gen_accel.attention_processors.image_prompt import new_adapter

    if config.init_adapter is not None:
        from gen_accel.pipelines.image_prompt.formats import build_adapter

        adapter = build_adapter(read_start(config, transformer), transformer)
        have = adapter.projector.tokens
        if have != config.image_tokens:
            raise ValueError(
                f"init_adapter {config.init_adapter} makes {have} tokens of an image, "
                f"image_tokens is {config.image_tokens}"
            )
        return adapter
    family = family_for(transformer, "image prompts")
    widths = {site.width for site in family.image_attentions(transformer)}
    assert len(widths) == 1, widths
    torch.manual_seed(config.seed)
    coder = ImageCoder.of(config)
    projector = coder.new_projector(cache.image(0).shape, widths.pop(), config.image_tokens)
    return new_adapter(transformer, projector, variant=coder.variant, start="identity")
