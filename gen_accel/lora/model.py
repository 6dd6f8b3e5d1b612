"""The model to train, and how its frozen weights are held."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.families import family_of
from gen_accel.lora.config import TrainConfig
from gen_accel.pipelines.generation.single_file import load_to_quantise, original_in

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class ModelToTrain(NamedTuple):
    """The model to train and the numbers that its training needs.

    Args:
        pipe: None if no videos are sampled.
        frames: maps a number of pixel frames to the number of latent frames.
        trained_frames: pixel frames that the model was trained on; None if unknown.
        shift: shift of the noise levels.
        boundary: noise level at which a model of two experts switches between them.
        condition: "text", or "first_frame" where the model is shown each clip's first frame.
        prompts: the validation prompts as `pipe` takes them encoded; None for the text.
        schedule: config of the pipeline's scheduler; None for the published one.
    """

    transformer: "ModelMixin"
    pipe: "DiffusionPipeline | None"
    frames: Callable[[int], int]
    trained_frames: int | None
    shift: float
    boundary: float | None = None
    condition: str = "text"
    schedule: Mapping[str, object] | None = None
    prompts: tuple[dict[str, Tensor], ...] | None = None


STORED = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
NF4_BLOCK = 64  # weights with a scale of their own
# Parts of names whose layers steer others: they stay as they are, as in diffusers' own casting.
KEPT = ("norm", "pos_embed", "patch_embed", "lora_", ".processor.", "image_adapter")


def cast_base(transformer: "ModelMixin", config: TrainConfig) -> None:
    """Store the linear layers of the blocks in another dtype than they compute in, where the
    config's `base` says so.

    Called after the adapter is on the model: what trains is left as it is.
    """
    if config.base is None or not config.casts_base:
        return
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError(
            f"base {config.base} stores weights in another type, and those of {config.model} are "
            "quantised already: leave base out"
        )
    from diffusers.hooks import apply_layerwise_casting

    computed = compute_dtype(transformer)
    patterns = tuple(pattern.replace(".", r"\.") for pattern in KEPT)
    for name in block_names(transformer):
        block = transformer.get_submodule(name)
        apply_layerwise_casting(
            block,
            STORED[config.base],
            computed,
            skip_modules_pattern=patterns,
            skip_modules_classes=(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
        )


def compute_dtype(transformer: nn.Module) -> torch.dtype:
    """Return the dtype that the blocks' layers were loaded in."""
    linear = linear_names(transformer)
    return transformer.get_submodule(linear[0]).weight.dtype  # pyright: ignore


def block_names(transformer: nn.Module) -> list[str]:
    """Names of the blocks with video attention, in their order."""
    return list(
        dict.fromkeys(site.name for site in family_of(transformer).self_attentions(transformer))
    )


def linear_names(transformer: nn.Module) -> list[str]:
    """Names of the linear layers that are held in fewer bits."""
    blocks = tuple(f"{name}." for name in block_names(transformer))
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(blocks)
        and not any(part in name for part in KEPT)
    ]


def held_names(transformer: nn.Module, base: str | None) -> list[str]:
    """Names of the linear layers that `base` applies to.

    NF4 leaves out layers whose width is no multiple of its blocks: bitsandbytes' kernel for CPUs
    (0.50) takes the scales of other blocks there.
    """
    names = linear_names(transformer)
    if base != "nf4":
        return names
    layers = {name: transformer.get_submodule(name) for name in names}
    return [name for name, layer in layers.items() if layer.in_features % NF4_BLOCK == 0]  # pyright: ignore


def hollow_of(kind: Any, source: str, part: str) -> "ModelMixin":
    """Build a transformer of diffusers from its config, without weights, on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return kind.from_config(kind.load_config(source, subfolder=part))


def load_quantised(
    kind: "type[ModelMixin]",
    source: str,
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cut: bool = False,
) -> "ModelMixin":
    """Load a transformer of diffusers onto the CPU, with its blocks' linear layers quantised on
    the way: neither device holds all of them as they were.

    Args:
        source: folder or hub repository of the pipeline.
        config: its `base` is int8 or nf4; its `part` names the transformer.
        dtype: dtype of all else, and the one to compute in.
        device: device to quantise on.
        cut: whether FSDP is to cut the weights, which it does with floating-point tensors alone:
            the bits of nf4 are then kept in tensors of `dtype`.
    """
    hollow = hollow_of(kind, source, config.part)
    held = set(held_names(hollow, config.base))
    kept = [
        name
        for name, module in hollow.named_modules()
        if isinstance(module, nn.Linear) and name not in held
    ]
    original = original_in(Path(source) / config.part)

    def load(how: Any, device_map: Any = None) -> Any:
        if original is not None:
            return load_to_quantise(original, kind, dtype, how, device_map)
        options = {"subfolder": config.part, "dtype": dtype, "device_map": device_map}
        return kind.from_pretrained(source, quantization_config=how, **options)

    if config.base == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        # Whole names of parameters: a shorter one would also match the ends of others.
        names = [f"{name}.weight" for name in kept]
        how = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=names)
        return load(how)
    from diffusers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if cut else torch.uint8,
        llm_int8_skip_modules=kept,
    )
    with _quantising_on(device):
        # Named here, as diffusers would take a GPU. torchao would leave out what it names.
        model = load(how, {"": "cpu"})
    for module in model.modules():
        # Else some CPUs pack weights again at the first evaluation, which have no gradient then.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


@contextmanager
def _quantising_on(device: torch.device) -> Iterator[None]:
    """Let diffusers quantise a model for the CPU by bitsandbytes, each layer on `device`.

    diffusers asks for a GPU to hold the model; bitsandbytes has had kernels for CPUs since then.
    """
    from diffusers.quantizers import auto
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    class OnCpu(BnB4BitDiffusersQuantizer):
        def validate_environment(self, *args: object, **kwargs: object) -> None:
            """Accept a machine without a GPU."""

        def create_quantized_param(
            self,
            model: "ModelMixin",
            param_value: Tensor,
            param_name: str,
            target_device: torch.device,
            *rest: Any,
            **options: Any,
        ) -> None:
            given = model, param_value, param_name, device
            super().create_quantized_param(*given, *rest, **options)
            place, _, name = param_name.rpartition(".")
            held: dict[str, Any] = model.get_submodule(place)._parameters
            held[name] = held[name].to(target_device)

    known, name = auto.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit"
    before = known[name]
    known[name] = OnCpu
    try:
        yield
    finally:
        known[name] = before
