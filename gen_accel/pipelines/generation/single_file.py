"""Weights of one part of a pipeline in a single file, as ComfyUI and musubi-tuner have them.

Such a file lies in the folder of its part, beside the config of diffusers, as a link of the name
`original.safetensors` or `original.gguf`; `assemble` makes such folders. Its tensors have the
names of the original model, which diffusers brings to its own (`SINGLE_FILE_LOADABLE_CLASSES`).
Here each tensor is looked for, by the header alone or with its values: a model is loaded whole, or
refused by the names of what is missing.

What is added to diffusers' reading: weights of fp8 with a scale for each, ComfyUI's "fp8_scaled",
become `weight.to(float32) * scale`, rounded once to the dtype that is asked for; and text encoders
of the T5 family may have the names of Wan's own.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_accel.attention_processors.attached.trained import TRAINED
from gen_accel.hub import silenced
from gen_accel.io import named, read_fields, read_tensors
from gen_accel.parsing import shown
from gen_accel.paths import WEIGHTS, check_input
from gen_accel.registry import needed_for

if TYPE_CHECKING:
    from diffusers import ModelMixin

GGUF = WEIGHTS[1]
NAMES = tuple(f"original{suffix}" for suffix in WEIGHTS)
# Weights in the names of diffusers and transformers.
OWN = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)\b.*\.(safetensors|bin)")
# Beside weights: the scale of one, and what only ComfyUI reads.
SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
BESIDE = re.compile(r"(.+\.)?(scaled_fp8|scale_input|input_scale|comfy_quant|spiece_model)")
# Before all names: of TurboDiffusion's training, and of Self-Forcing's.
NET = re.compile(r"net\.|model\.(?!diffusion_model\.)")
READ = "fp32, fp16, bf16, fp8, fp8_scaled and GGUF are read"
# Encoders of the T5 family: names of Wan's own files, and of transformers.
T5_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
T5 = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


class Misfit(ValueError):
    """A file does not hold the weights of a model.

    Args:
        distance: number of tensors that are in one of the two alone.
    """

    def __init__(self, message: str, distance: float = float("inf")) -> None:
        super().__init__(message)
        self.distance = distance


def original_in(folder: Path) -> Path | None:
    """Find the single file in the folder of a part; None if there is none.

    Raises:
        ValueError: two of them, or one beside weights in the names of diffusers.
        FileNotFoundError: a link to a file that is gone.
    """
    found = [folder / name for name in NAMES if os.path.lexists(folder / name)]
    if not found:
        return None
    held = [*(one.name for one in found), *filter(OWN.fullmatch, os.listdir(folder))]
    if len(held) > 1:
        raise ValueError(f"{folder} holds its weights twice, {named(held)}: leave one there")
    if not found[0].exists():
        raise FileNotFoundError(
            f"{found[0]} is a link to {os.readlink(found[0])}, which is not there: put the file "
            "back, or `gen-accel assemble` again"
        )
    return found[0]


def base_of(files: Sequence[Path]) -> str:
    """Name the repository that diffusers takes the largest of some files to be of.

    Raises ValueError if it knows none of them.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    unknown = fetch_diffusers_config({})  # a name in place of none
    for file in sorted(files, key=lambda one: one.stat().st_size, reverse=True):
        try:
            found = fetch_diffusers_config(plain_names(header_of(file)))
        except (LookupError, UnboundLocalError):
            continue
        if found != unknown:
            return found["pretrained_model_name_or_path"]
    raise ValueError(
        f"diffusers does not know what {named(map(str, files))} is of: give the pipeline whose "
        "configs it goes with by base, a folder or a hub repository"
    )


def check_original(file: Path, kind: type[Any], folder: Path) -> None:
    """Refuse a file that is not of one model, by its header alone.

    Args:
        kind: class of diffusers or transformers.
        folder: with the config of the model.

    Raises:
        ValueError: no file of safetensors or GGUF, or a broken one; weights of a kind that is not
            read; tensors that are missing, have no place or are of another size.
    """
    if file.suffix == GGUF and not _is_of_diffusers(kind):
        raise Misfit(
            f"{file} is a GGUF of a {kind.__name__}, which diffusers does not read: give it as "
            ".safetensors, of fp16 or fp8_scaled"
        )
    _fitted(file, kind, folder, header_of(file), None)


def load_original(file: Path, kind: type[Any], dtype: torch.dtype) -> "nn.Module":
    """Load the model of a single file, which lies beside its config, onto the CPU.

    Equal to the last bit to the same weights in a folder of diffusers. Weights of a GGUF file stay
    as they are, and are dequantised layer by layer as they are used.

    Args:
        kind: class of diffusers or transformers.

    Raises ValueError as `check_original`.
    """
    if file.suffix == GGUF:
        from diffusers import GGUFQuantizationConfig

        check_original(file, kind, file.parent)
        how = GGUFQuantizationConfig(compute_dtype=dtype)
        return _from_single_file(file, str(file), kind, dtype, how)
    model: Any
    model, tensors = _fitted(file, kind, file.parent, read_tensors(file)[0], dtype)
    if not _is_of_diffusers(kind):
        config = model.config
        return kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    kept = model._keep_in_fp32_modules or []
    for name, x in tensors.items():
        is_kept = not {*name.split(".")}.isdisjoint(kept)
        tensors[name] = x.to(torch.float32 if is_kept else dtype).contiguous()
    model.load_state_dict(tensors, assign=True)
    model.register_to_config(_name_or_path=str(file.parent))
    return model.eval()


def _is_of_diffusers(kind: type[Any]) -> bool:
    from diffusers import ModelMixin

    return issubclass(kind, ModelMixin)


def load_to_quantise(
    file: Path, kind: type[Any], dtype: torch.dtype, how: Any, device_map: object
) -> "ModelMixin":
    """Load the model of a single file onto the CPU, quantised on the way as `from_pretrained`
    does the same weights.

    Args:
        how: config of the quantisation, of diffusers.

    Raises ValueError as `check_original`, and for a GGUF file.
    """
    if file.suffix == GGUF:
        raise ValueError(
            f"{file} is quantised already: leave base or quantize out, or give a file of fp16 or "
            "bf16"
        )
    _, tensors = _fitted(file, kind, file.parent, read_tensors(file)[0], dtype)
    from diffusers.quantizers import auto

    known, name = auto.AUTO_QUANTIZER_MAPPING, how.quant_method.value
    name = "bitsandbytes_4bit" if getattr(how, "load_in_4bit", False) else name
    before = known[name]

    class Fresh(before):
        """`from_single_file` takes all weights for quantised ones."""

        def __init__(self, config: object, **options: object) -> None:
            super().__init__(config, **{**options, "pre_quantized": False})

    known[name] = Fresh
    try:
        return _from_single_file(file, tensors, kind, dtype, how, device_map)
    finally:
        known[name] = before


def _from_single_file(
    file: Path,
    weights: object,
    kind: type[Any],
    dtype: torch.dtype,
    how: object,
    device_map: object = None,
) -> "ModelMixin":
    with silenced("diffusers"):
        model = kind.from_single_file(
            weights,
            config=str(file.parent.parent),
            subfolder=file.parent.name,
            dtype=dtype,
            local_files_only=True,
            quantization_config=how,
            device_map=device_map,
        )
    model.register_to_config(_name_or_path=str(file.parent))
    return model


def header_of(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file on the meta device, without reading them."""
    check_input(file)
    if file.suffix == GGUF:
        return _gguf_header(file)
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, "pt") as held:
            for key in held.keys():  # noqa: SIM118
                one = held.get_slice(key)
                found[key] = torch.empty(
                    one.get_shape(), dtype=_TYPES.get(one.get_dtype(), torch.uint8), device="meta"
                )
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
    return found


_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _gguf_header(file: Path) -> dict[str, Tensor]:
    with needed_for("reading a GGUF file", extra="quantized"):
        from gguf import GGUFReader

    try:
        held = GGUFReader(file).tensors
        shapes = {one.name: [int(side) for side in reversed(one.shape)] for one in held}
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no GGUF file, or a broken one: {shown(error)}") from error
    return {name: torch.empty(sides, device="meta") for name, sides in shapes.items()}


def _fitted(
    file: Path,
    kind: type[Any],
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model without weights, and the tensors of a file by its names."""
    config: dict[str, Any] = {}
    if _is_of_diffusers(kind):
        from accelerate import init_empty_weights

        config = read_fields(folder / "config.json")
        with init_empty_weights():  # buffers that no file holds keep their values
            hollow = kind.from_config(config)
    else:
        with torch.device("meta"):
            hollow = kind(kind.config_class.from_pretrained(folder))
    tensors = plain_names(tensors) if _is_of_diffusers(kind) else tensors
    tensors = _descaled(tensors, file, dtype)
    tensors = {key: x for key, x in tensors.items() if not TRAINED.fullmatch(key)}  # see `load`
    places: Any = hollow.state_dict(keep_vars=True)
    if not places.keys() <= tensors.keys():
        tensors = _renamed(tensors, kind, config, file)
    for key in tensors.keys() & places.keys():
        x, shape = tensors[key], places[key].shape
        if x.ndim == 2 < len(shape) and x.shape == (shape[0], shape[1:].numel()):
            tensors[key] = x.view(shape)  # patches by a linear layer, as TurboDiffusion has them
    ignored = getattr(hollow, "_keys_to_ignore_on_load_unexpected", None) or []
    extra = [key for key in tensors if key not in places]
    extra = [key for key in extra if not any(re.search(one, key) for one in ignored)]
    tied = defaultdict(list)
    for key, place in places.items():
        tied[id(place)].append(key)
    wrong = {
        "lacks": [keys[0] for keys in tied.values() if tensors.keys().isdisjoint(keys)],
        "has no place for": extra,
        "has another size for": [
            f"{key} {tuple(tensors[key].shape)}, which has {tuple(place.shape)} there"
            for key, place in places.items()
            if key in tensors and tensors[key].shape != place.shape
        ],
    }
    # The model lacks what the file has too much.
    said = [
        f"{'it' if what == 'lacks' else 'the model'} {what} {len(keys)} of "
        f"{len(places) if what == 'lacks' else len(tensors)} tensors, such as {named(keys, 2)}"
        for what, keys in wrong.items()
        if keys
    ]
    if said:
        raise Misfit(
            f"{file} does not hold the {kind.__name__} of {folder / 'config.json'}: "
            f"{'; '.join(said)}",
            sum(map(len, wrong.values())),
        )
    return hollow, {key: x for key, x in tensors.items() if key in places}


def plain_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Strip the `NET` that some trainings put before all names."""
    if not all(map(NET.match, tensors)):
        return tensors
    return {NET.sub("", key, count=1): x for key, x in tensors.items()}


def _descaled(
    tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Multiply weights by their scales, and leave out what is no weight.

    Args:
        dtype: of the products; None: float32.
    """
    scales = {found[1]: key for key in tensors if (found := SCALE.fullmatch(key))}
    kept = {}
    for key, x in tensors.items():
        if SCALE.fullmatch(key) or BESIDE.fullmatch(key):
            continue
        if not x.is_floating_point():
            raise ValueError(
                f"{file} holds {shown(key)} as whole numbers, quantised in a way of its own: "
                f"{READ}"
            )
        layer = key.removesuffix(".weight")
        if layer != key and layer in scales:
            name = scales.pop(layer)
            scale = tensors[name]
            if scale.numel() not in (1, len(x)) or not scale.is_floating_point():
                raise ValueError(
                    f"{file} holds {shown(name)} of {tuple(scale.shape)} for a weight of "
                    f"{tuple(x.shape)}, which must be one scale, or one for each row: {READ}"
                )
            sides = [scale.numel()] + [1] * (x.ndim - 1)
            x = x.float() * scale.float().reshape(sides)
            x = x if dtype is None else x.to(dtype)
        kept[key] = x
    if scales:
        raise ValueError(f"{file} holds scales of weights that it lacks: {named(scales.values())}")
    return kept


def _renamed(
    tensors: Mapping[str, Tensor], kind: type[Any], config: dict[str, Any], file: Path
) -> dict[str, Tensor]:
    """Give tensors the names of diffusers or transformers."""
    if not _is_of_diffusers(kind):
        return {_t5_name(key): x for key, x in tensors.items()}
    convert = converter_of(kind)
    if convert is None:
        raise Misfit(
            f"{file} is not in the names of diffusers, which reads no others of a "
            f"{kind.__name__}: save that part by diffusers"
        )
    try:
        return convert(checkpoint={**tensors}, config=config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise Misfit(
            f"{file} holds no {kind.__name__}: its tensors are {named(map(shown, tensors))}"
        ) from None


def converter_of(kind: type[Any]) -> Any:
    """Return diffusers' own function from the original names to its own; None if it has none."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    for name, about in CLASSES.items():
        known = getattr(diffusers, name, None)
        if isinstance(known, type) and issubclass(kind, known):
            return about["checkpoint_mapping_fn"]
    return None


def has_converter(name: str) -> bool:
    """Whether diffusers brings the original names of a class of its own to its own."""
    import diffusers

    kind = getattr(diffusers, name, None)
    return isinstance(kind, type) and converter_of(kind) is not None


def _t5_name(key: str) -> str:
    name, _, end = key.rpartition(".")
    block = T5_BLOCK.fullmatch(name)
    if block is None:
        return f"{T5[name]}.{end}" if name in T5 else key
    return f"encoder.block.{block[1]}.{T5.get(block[2], block[2])}.{end}"
