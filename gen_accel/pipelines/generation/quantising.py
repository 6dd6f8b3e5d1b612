"""Transformers whose blocks hold their weights in fewer bits than they compute in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.clock import TRANSFORMERS
from gen_accel.attention_processors.families.weights import (
    KEPT,
    block_names,
    held_names,
    linear_names,
)
from gen_accel.io import read_fields
from gen_accel.pipelines.generation.single_file import GGUF, load_to_quantise, original_in

if TYPE_CHECKING:
    from diffusers import ModelMixin

STORED = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def check_plain(folder: Path, how: str) -> None:
    """Refuse a pipeline's folder whose transformer is quantised already, to hold it as `how`."""
    for part in TRANSFORMERS:
        config = folder / part / "config.json"
        if not config.is_file():
            continue
        original = original_in(folder / part)
        is_gguf = original is not None and original.suffix == GGUF
        if is_gguf or read_fields(config).get("quantization_config") is not None:
            raise ValueError(
                f"{original if is_gguf else config.parent} is quantised already: leave quantize "
                f"{how} out, or give weights of fp16 or bf16"
            )


def store_as(transformer: "ModelMixin", how: str, what: str) -> None:
    """Store the linear layers of the blocks in another dtype than they compute in.

    Called after a LoRA is on the model, whose layers are left as they are.

    Args:
        how: of `STORED`.
        what: the option that asks for it, for the message.

    Raises ValueError for weights that are quantised already.
    """
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{what} {how} stores weights in another type, and those of "
            f"{transformer.config['_name_or_path']} are quantised already: leave {what} out"
        )
    from diffusers.hooks import apply_layerwise_casting

    linear = transformer.get_submodule(linear_names(transformer)[0])
    computed: Any = linear.weight.dtype  # in which they were loaded
    patterns = tuple(pattern.replace(".", r"\.") for pattern in KEPT)
    for name in block_names(transformer):
        block = transformer.get_submodule(name)
        apply_layerwise_casting(
            block,
            STORED[how],
            computed,
            skip_modules_pattern=patterns,
            skip_modules_classes=(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
        )


def hollow_of(kind: Any, source: str, part: str) -> "ModelMixin":
    """Build a transformer of diffusers from its config, without weights, on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return kind.from_config(kind.load_config(source, subfolder=part))


def load_quantised(
    kind: "type[ModelMixin]",
    source: str,
    part: str,
    how: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    cut: bool = False,
) -> "ModelMixin":
    """Load a transformer of diffusers onto the CPU, with its blocks' linear layers quantised on
    the way: neither device holds all of them as they were.

    Args:
        source: folder or hub repository of the pipeline.
        part: of the pipeline, the transformer.
        how: int8 or nf4.
        dtype: dtype of all else, and the one to compute in.
        device: device to quantise on.
        cut: whether FSDP is to cut the weights, which it does with floating-point tensors alone:
            the bits of nf4 are then kept in tensors of `dtype`.
    """
    hollow = hollow_of(kind, source, part)
    held = set(held_names(hollow, how))
    kept = [
        name
        for name, module in hollow.named_modules()
        if isinstance(module, nn.Linear) and name not in held
    ]
    original = original_in(Path(source) / part)

    def load(asked: Any, device_map: Any = None) -> Any:
        if original is not None:
            return load_to_quantise(original, kind, dtype, asked, device_map)
        options = {"subfolder": part, "dtype": dtype, "device_map": device_map}
        return kind.from_pretrained(source, quantization_config=asked, **options)

    if how == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        # Whole names of parameters: a shorter one would also match the ends of others.
        names = [f"{name}.weight" for name in kept]
        return load(TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=names))
    from diffusers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if cut else torch.uint8,
        llm_int8_skip_modules=kept,
    )
    with _quantising_on(device):
        # Named here, as diffusers would take a GPU. torchao would leave out what it names.
        model = load(asked, {"": "cpu"})
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
