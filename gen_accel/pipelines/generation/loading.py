"""Loading of a pipeline from a folder or the hub: missing files, weights, LoRAs, device."""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gen_accel import registry
from gen_accel.attention_processors.attached.clock import TRANSFORMERS, served_transformers
from gen_accel.attention_processors.attached.recipe import WEIGHTS, folders_of, read_recipe
from gen_accel.attention_processors.attached.trained import keep_trained, trained_in
from gen_accel.attention_processors.families.pipelines import choose, choose_in, part_of, takes
from gen_accel.hub import (
    asked,
    cached_index,
    check_there,
    fetched,
    file_in,
    index_file,
    parted,
    reachable,
)
from gen_accel.io import named, read_fields, read_index
from gen_accel.parsing import cut, shown
from gen_accel.paths import expanded
from gen_accel.pipelines.generation.config import ConditioningFiles
from gen_accel.pipelines.generation.config import Loading as Loading
from gen_accel.pipelines.generation.decode import check_streamed
from gen_accel.pipelines.generation.inputs import identity
from gen_accel.pipelines.generation.kept import HOST, PipelineCache
from gen_accel.pipelines.generation.lora_file import (
    FACTORED,
    Whole,
    brought_home,
    check_options,
    load_factored,
    read_lora,
    split_whole,
)
from gen_accel.pipelines.generation.model_index import (
    Index,
    classes_in,
    index_of,
    load_part,
    location_of,
    one_line,
    options_in,
    part_class,
    pipeline_class,
    places_of,
)
from gen_accel.pipelines.generation.of_blocks import is_of_blocks
from gen_accel.pipelines.generation.progress import Progress, ticker
from gen_accel.pipelines.generation.quantising import check_plain, load_quantised, store_as
from gen_accel.pipelines.generation.sampling import arguments, parameters, served_family
from gen_accel.pipelines.generation.single_file import original_in
from gen_accel.registry import EXPERTS, KINDS, needed_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

# Names of a layer's two matrices in a file: by PEFT, by older diffusers, by kohya.
PARTS = re.compile(r"(.+?)\.(?:lora_(A|B)|lora\.(down|up)|lora_(down|up))\.weight")
BESIDE = re.compile(r"(.+)\.lora_(?:magnitude_vector|B\.bias)")
DOWN = ("A", "down")
OF_LOW_NOISE = re.compile(r"(^|[-_.])low([-_.]?noise|[-_.]|$)")  # in the name of a file
Value = TypeVar("Value")
LOADED = (".safetensors", ".json", ".txt", ".model", ".jinja")  # files of a part that are loaded
VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)\b")  # weights that load by that word alone
DTYPES = {name: getattr(torch, name) for name in registry.DTYPES}


def load(
    model: str | Path,
    loading: Loading | None = None,
    given: ConditioningFiles | None = None,
    *,
    parts: Mapping[str, nn.Module | None] | None = None,
    cache: PipelineCache | None = None,
) -> "DiffusionPipeline":
    """Load the pipeline onto its device, with its LoRAs.

    Args:
        parts: models that are loaded already, or None for those to do without, by name.
        cache: keeps the weights for the next call, and may have them from the last.
        given: what the video is made from besides text, which decides the class of the pipeline
            if the weights serve several. None: the class that the folder names.

    Raises:
        ValueError: a model that `index_of` refuses, a missing device, a LoRA that does not fit or
            fits only in part, integer weights of the transformer, or weights that are quantised
            already and asked to be.
        OSError: a missing file or repository.
    """
    loading = loading or Loading()
    loading.check_quantised()
    device, dtype = _placement(loading)
    index, source, how = index_of(model), location_of(model), loading.quantize
    loras = [lora_source(text) for text in loading.loras]
    name = index["_class_name"] if given is None else _chosen(index, source, given)
    kind, places = pipeline_class(name), places_of(index, source)
    blocks = is_of_blocks(kind)
    if blocks:
        needed = needed_parts(name, () if given is None else given.kinds)
        places = {part: place for part, place in places.items() if part in needed}
    known = places.keys() - (parts or {}).keys()
    quantised = known & {*TRANSFORMERS} if how in registry.QUANTISERS else set[str]()
    own = read_fields(index_file(source))
    # Classes that diffusers does not know, see `published.PARTS`, it does not load around.
    foreign = any(list(own[part][:2]) != list(index[part]) for part in places)
    alone = set(known)
    if not (blocks or foreign):
        alone = {part for part in known - quantised if original_in(Path(*places[part]))}
    _check_floats(Path(source))
    if how is not None:
        check_plain(Path(source), how)
    for lora in dict(loras) if quantised else ():
        if (kind_of_lora := _kind_of(lora)) in FACTORED:
            raise ValueError(
                f"{lora} is of kind {kind_of_lora}, which does not go onto quantize {how}: take "
                "fp8, or leave quantize out"
            )

    def loaded() -> "DiffusionPipeline":
        if not Path(source).exists() and not parts:
            fetch(source, places)
        with one_line(model):
            read: dict[str, Any] = {}
            for one in alone | quantised:
                place, folder = places[one]
                if one in quantised:
                    made = part_class(index[one], one)
                    read[one] = load_quantised(made, place, folder, str(how), dtype, device)
                else:
                    read[one] = load_part(place, folder, index[one], dtype)
            read |= parts or {}
            if blocks:
                pipe = kind.of_parts(options_in(index), read)
            elif foreign:
                pipe = kind(**options_in(index), **read)
                pipe.register_to_config(_name_or_path=source)
            else:
                pipe = kind.from_pretrained(source, dtype=dtype, **read)
        _check_complete(pipe, model)
        for part in TRANSFORMERS if not parts else ():
            _keep_trained(pipe, source, part)
        return pipe

    if cache is None or parts:
        pipe = loaded()
    else:
        # A value that changes with the files: on the hub, a snapshot's name is a commit.
        state = identity(source) if Path(source).exists() else cached_index(source)
        key = name, dtype, source, state, how if quantised else None, (*places,)
        pipe = cache.taken(key, loaded)
    _take_factors(pipe)
    pipe.set_progress_bar_config(disable=True)
    if given is None and arguments(pipe)["frames"] not in parameters(pipe):
        raise ValueError(
            f"{type(pipe).__name__} makes no video from a prompt alone: it takes no num_frames"
        )
    if served_family(pipe).generation.tiled:
        pipe.vae.enable_tiling()
    add_loras(pipe, loras)
    if how == "fp8":  # after LoRAs, whose layers stay as they are
        for module in served_transformers(pipe).values():
            store_as(module, how, "quantize")
    _place(pipe, loading.offload, device)
    return pipe


def needed_parts(kind: str, asked: Collection[str]) -> list[str]:
    """Name the parts that a pipeline of blocks loads to make a video from what is asked.

    Args:
        kind: its class.
        asked: of `registry.KINDS`.
    """
    row = takes(kind)
    names = {} if row is None else dict(zip(KINDS[1:], row.arguments, strict=True))
    return pipeline_class(kind).needed([names[one] for one in asked if one in names])


def missing_files(repository: str, needed: Collection[str] | None = None) -> dict[str, int]:
    """Return the files of a pipeline that loading reads and the cache lacks, with their bytes.

    Args:
        needed: the parts that are loaded; None for all in the index.

    Raises OSError where the hub does not answer.
    """
    from huggingface_hub import try_to_load_from_cache

    index = read_index(index_file(repository))
    parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    parts &= parts if needed is None else {*needed}
    found = asked(repository, files_metadata=True)
    missing = {}
    for one in found.siblings or ():
        place = PurePosixPath(one.rfilename)
        is_read = str(place.parent) in parts and place.suffix in LOADED
        if not is_read or VARIANT.search(place.name):
            continue
        if not isinstance(
            try_to_load_from_cache(repository, one.rfilename, revision=found.sha), str
        ):
            missing[one.rfilename] = one.size or 0
    return missing


def fetch(repository: str, needed: Collection[str] | None = None) -> None:
    """Fetch what the cache lacks of a pipeline, under a bar of megabytes that moves with each
    file. Without a network nothing is fetched: loading says what is not there.

    Raises OSError for a file that cannot be fetched.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    missing: dict[str, int] = {}
    with suppress(OSError):
        missing = missing_files(repository, needed)
    if not missing:
        return
    done, total, shown = 0, sum(missing.values()), not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()  # one for each file
    try:
        with Progress() as bar:
            tick = ticker(bar, f"fetching {repository}", "MB")
            tick(0, round(total / 1e6))
            for name, size in missing.items():
                fetched(repository, name)
                done += size
                tick(round(done / 1e6), round(total / 1e6))
    finally:
        if shown:
            enable_progress_bars()


def load_decoder(model: str | Path, loading: Loading | None = None) -> "DiffusionPipeline":
    """Load the pipeline with its autoencoder only, for `decode_stream`.

    Raises:
        ValueError: a model that `index_of` refuses, a missing device, LoRAs, which do not change
            the decoding, or a pipeline that decodes in its own way.
        OSError: a missing file or repository.
    """
    loading = loading or Loading()
    if loading.loras:
        raise ValueError(f"a LoRA does not change how latents are decoded, got {loading.loras}")
    device, dtype = _placement(loading)
    index = index_of(model)
    check_streamed(*classes_in(index, model))
    kind = pipeline_class(index["_class_name"])
    with one_line(model):
        place, folder = places_of(index, location_of(model))["vae"]
        vae = load_part(place, folder, index["vae"], dtype)
    if is_of_blocks(kind):
        pipe = kind.of_parts({}, {"vae": vae})
    else:
        known = inspect.signature(kind.__init__).parameters
        parts = [name for name, one in known.items() if one.default is one.empty]
        pipe = kind(**(dict.fromkeys(parts[1:]) | {"vae": vae}))
    _place(pipe, loading.offload, device)
    return pipe


def find_device(name: str) -> torch.device:
    """Return the device of that name, or the best one for "auto".

    Raises ValueError for a device that this machine or this torch does not have.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or HOST
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {shown(name)}") from None
    if device.type == "cpu":
        return device
    have = "only the CPU" if found is None else f"the CPU and {found.type}"
    if found is None or device.type != found.type:
        raise ValueError(
            f"device {shown(name)} is not there: torch {torch.__version__} finds {have}"
        )
    if (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise ValueError(f"device {shown(name)} is not there: {count} of {found.type}, from 0")
    return device


def _placement(loading: Loading) -> tuple[torch.device, torch.dtype]:
    device = find_device(loading.device)
    if loading.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload {loading.offload!r} needs a GPU to load onto; the device is the CPU"
        )
    if loading.quantize is not None and device.type == "mps":
        raise ValueError(
            f"quantize {loading.quantize} needs the CPU or CUDA, and the device is mps: leave "
            "quantize out, or give device cpu"
        )
    if loading.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, DTYPES[loading.dtype]


def _chosen(index: Index, source: str, given: ConditioningFiles) -> str:
    """Name the pipeline class that makes a video from what is given, see `families.pipelines`."""
    asked, strength = given.kinds, given.strength is not None
    if Path(source).exists():
        return choose_in(Path(source), asked, strength=strength)
    config = {}
    with suppress(OSError):  # if the classes tell enough
        config = read_fields(fetched(source, f"{part_of(index)}/config.json"))
    return choose(index, config, asked, source, strength=strength)


def _check_floats(folder: Path) -> None:
    """Refuse integer weights of a transformer, which diffusers would cast."""
    for file in (one for part in TRANSFORMERS for one in folder.glob(f"{part}/*.safetensors")):
        config = file.with_name("config.json")
        if config.is_file() and "quantization_config" in config.read_text(encoding="utf-8"):
            continue
        try:
            with safe_open(file, framework="pt") as held:
                kinds = {key: held.get_slice(key).get_dtype() for key in held.keys()}  # noqa: SIM118
        except SafetensorError:
            continue  # diffusers reports the fault
        wrong = [key for key in kinds if key.endswith((".weight", ".bias"))]
        wrong = [key for key in wrong if kinds[key].startswith(("I", "U", "BOOL"))]
        if wrong:
            raise ValueError(
                f"{file} holds weights of {kinds[wrong[0]]}: {named(map(cut, wrong))}"
            )


def _check_complete(pipe: "DiffusionPipeline", model: str | Path) -> None:
    """Refuse a model whose files lack weights: such weights stay on the meta device."""
    for name, part in pipe.components.items():
        parameters = part.named_parameters() if isinstance(part, nn.Module) else ()
        lacking = [key for key, value in parameters if value.is_meta]
        if lacking:
            raise ValueError(
                f"{name} of {model} lacks {len(lacking)} of its weights, such as {lacking[0]}: "
                "its files are not whole, fetch or save them again"
            )


def _keep_trained(pipe: "DiffusionPipeline", source: str, part: str) -> None:
    """Keep what the files of a transformer have for a method and diffusers leaves out."""
    model, folder = getattr(pipe, part, None), Path(source)
    if not folder.exists() and (cached := cached_index(source)) is not None:
        folder = cached.parent
    files = sorted((folder / part).glob("*.safetensors"))
    if isinstance(model, nn.Module) and (found := trained_in(files)):
        keep_trained(model, found, source)


def _take_factors(pipe: "DiffusionPipeline") -> None:
    """Let the autoencoder's config say how it scales: some classes of diffusers count its stages,
    which is wrong for one that takes pixels in patches."""
    config: Mapping[str, object] = getattr(getattr(pipe, "vae", None), "config", {})
    for axis in ("spatial", "temporal"):
        name, factor = f"vae_scale_factor_{axis}", config.get(f"scale_factor_{axis}")
        if factor is not None and getattr(pipe, name, factor) != factor:
            setattr(pipe, name, factor)
            if axis == "spatial":
                pipe.video_processor.register_to_config(vae_scale_factor=factor)


def _place(pipe: "DiffusionPipeline", offload: str, device: torch.device) -> None:
    match offload:
        case "none":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(
                onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
            )


def lora_source(text: str) -> tuple[str, float]:
    """Parse "folder:0.5" to the folder, file or repository and 0.5; OSError if it is not there."""
    source, weight = parted(text)
    repository, file = file_in(source)
    check_there(repository, "LoRA")
    if file:
        return str(fetched(repository, file)), weight
    path = expanded(source)
    return (str(path) if path.exists() else reachable(source)), weight


def add_loras(pipe: "DiffusionPipeline", loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRAs (source, weight), and make them active.

    Raises:
        ValueError: a LoRA that `check_lora` refuses.
        OSError: no LoRA at a source.
    """
    if not loras:
        return
    with needed_for("a LoRA", extra="video"):
        import peft  # noqa: F401
    names, alone = [f"lora_{i}" for i in range(len(loras))], _loads_alone(pipe)
    kinds = {source: _kind_of(source) for source, _ in loras}
    if len({*kinds.values()}) > 1:
        told = ", ".join(f"{source} is of kind {kind}" for source, kind in kinds.items())
        raise ValueError(f"LoRAs of several kinds do not run together: {told}")
    alone_whole: set[str] = set()  # without a product of two matrices, of which PEFT knows nothing
    for name, (source, weight) in zip(names, loras, strict=True):
        parts = _parts_of(source, pipe)
        if kinds[source] in FACTORED:
            for part, path in parts.items():
                model = getattr(pipe, part, None)
                if model is None:
                    raise ValueError(f"{source} is for {part}, which {type(pipe).__name__} lacks")
                file = file_of(path)
                load_factored(model, file, read_recipe(file), name)
            continue
        checked = {part: check_lora(pipe, path, part) for part, path in parts.items()}
        for part, (_, whole) in checked.items():
            if whole is not None:
                whole.apply(getattr(pipe, part), weight, source)
        if not any(home for home, _ in checked.values()):
            alone_whole.add(name)
            continue
        with one_line(source):
            for part in parts:
                home, options = checked[part][0], {"adapter_name": name}
                if isinstance(home, Path):  # with its alpha in its metadata
                    home, options["weight_name"] = str(home.parent), home.name
                if alone is None:
                    second = {"load_into_transformer_2": True} if part == EXPERTS[1] else {}
                    pipe.load_lora_weights(home, **options, **second)
                else:
                    alone.load_lora_adapter(home, prefix="transformer", **options)
        if alone is None and not any(name in one for one in pipe.get_list_adapters().values()):
            raise ValueError(f"{source} holds no LoRA for {type(pipe).__name__}")
    weights = {n: w for n, (_, w) in zip(names, loras, strict=True) if n not in alone_whole}
    if weights:
        (pipe if alone is None else alone).set_adapters([*weights], [*weights.values()])


def check_lora(
    pipe: "DiffusionPipeline", source: str, part: str = EXPERTS[0]
) -> tuple[Path | dict[str, Tensor], Whole | None]:
    """Refuse a LoRA that diffusers would load only in part, with no more than a log message.

    Args:
        part: the transformer that it is loaded into.

    Returns:
        The file to load, or the tensors in its place if diffusers does not read its names; and
        what in it is no product of two matrices.

    Raises:
        ValueError: layers that the model does not have, layers with one matrix missing or with no
            weights at all, matrices of another size, or integer weights.
        OSError: no LoRA there.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin

    kind, home, renamed, whole = type(pipe).__name__, None, None, None
    models: dict[str, nn.Module | None] = {EXPERTS[0]: _loads_alone(pipe)}
    if models[EXPERTS[0]] is None and not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"{kind} takes no LoRA, got {source}")
    file = file_of(source)
    tensors, about, alpha = read_lora(file)
    transformer = getattr(pipe, part, None)
    if isinstance(transformer, nn.Module):
        tensors, whole = split_whole(tensors, transformer, source)
        renamed = brought_home(tensors, transformer, source, alpha)
        home = renamed or (None if whole is None else tensors)
        if whole is not None and not tensors:
            return {}, whole
    if models[EXPERTS[0]] is None:
        # By default pipelines load nothing into the second of two transformers.
        parts = [name for name in pipe._lora_loadable_modules if name != EXPERTS[1]]
        options = {"unet_config": pipe.unet.config} if "unet" in parts else {}
        loader: Any = pipe
        # Copies, as some conversions multiply alphas in where the tensors lie.
        given = {key: x.clone() for key, x in (home or tensors).items()}
        try:
            converted = loader.lora_state_dict(given, **options)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise ValueError(
                f"{source} holds a LoRA in names that are not brought to those of {kind}, whole "
                f"or in part: {named(map(shown, tensors))}"
            ) from None
        tensors = converted[0] if isinstance(converted, tuple) else converted
        models = {name: getattr(pipe, name, None) for name in parts}
        if part == EXPERTS[1]:  # whose names in a file are those of the first
            models[EXPERTS[0]] = getattr(pipe, part, None)
            if models[EXPERTS[0]] is None:
                raise ValueError(f"{source} is for {part}, which this {kind} lacks")
    tensors = renamed or tensors
    rest = [key for key in tensors if models.get(key.partition(".")[0]) is None]
    if len(rest) == len(tensors):
        raise ValueError(f"{source} holds no LoRA for {kind}")
    if rest:
        raise ValueError(
            f"{source} does not fit {kind}, which has no place for {len(rest)} of its "
            f"{len(tensors)} tensors, such as {named(rest)}"
        )
    for name, model in models.items():
        if model is not None and not name.startswith("text_encoder"):
            options = None if about is None else under(name, about)
            check_fit(source, model, under(name, tensors), options)
    return home or file, whole


def check_fit(
    source: str, model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None
) -> None:
    """Check a LoRA against one model, as `check_lora` does.

    Args:
        tensors: tensors by their names in the model.
        about: options for PEFT in the file; None without any. A pattern in place of the target
            modules names no layers, and ends of names match none.
    """
    whole = [key for key, x in tensors.items() if not x.is_floating_point()]
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{source} holds weights of {kind}: {named(whole)}")
    layers = {name: module for name, module in model.named_modules() if name}
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for key, x in tensors.items():  # other names, such as alphas, are skipped
        if match := PARTS.fullmatch(key):
            layer, *which = match.groups()
            (down if any(one in DOWN for one in which) else up)[layer] = x
    if wrong := [key for key, x in tensors.items() if not x.float().isfinite().all()]:
        raise ValueError(f"{source} holds NaN or infinity in {named(map(shown, wrong))}")
    if about is not None and tensors:
        check_options(about, tensors, source)
    targets = (about or {}).get("target_modules") or ()
    have = down.keys() | up.keys()
    asked = have | (layers.keys() & (set() if isinstance(targets, str) else {*targets}))
    wrong = {
        "are not in the model": have - layers.keys(),
        "have no weights or half of them": asked - (down.keys() & up.keys()),
        "are of another size": {
            name
            for name in down.keys() & up.keys() & layers.keys()
            if not _fits(down[name], up[name], layers[name])
        },
        "have lengths or biases alone, or of another size": {
            match[1]
            for key, x in tensors.items()
            if (match := BESIDE.fullmatch(key))
            and (match[1] not in have or x.shape != up.get(match[1], x).shape[:1])
        },
    }
    said = [f"{len(ns)} {what}, such as {named(sorted(ns))}" for what, ns in wrong.items() if ns]
    if said:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: of its {len(asked)} layers "
            f"{'; '.join(said)}"
        )


def under(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Select the values whose names begin with `prefix` and a dot, and strip both."""
    begin = f"{prefix}."
    return {k.removeprefix(begin): x for k, x in values.items() if k.startswith(begin)}


def _parts_of(source: str, pipe: "DiffusionPipeline") -> dict[str, str]:
    """Map the parts of a pipeline that a LoRA is for to the folders or files to load.

    A LoRA from elsewhere is for the first transformer, or for the second of two if its name says
    that it is of low noise. Raises FileNotFoundError for a LoRA of two experts that lacks the
    second.
    """
    try:
        read_recipe(source)
    except (FileNotFoundError, ValueError):
        is_two = getattr(pipe, EXPERTS[1], None) is not None
        second = is_two and OF_LOW_NOISE.search(file_of(source).stem.lower())
        return {EXPERTS[1] if second else EXPERTS[0]: source}
    return {part: str(path) for part, path in folders_of(source).items()}


def _kind_of(source: str) -> str:
    """Kind of a LoRA; "lora" for one from elsewhere."""
    try:
        return read_recipe(file_of(source)).lora_kind
    except (FileNotFoundError, ValueError):
        return "lora"


def _loads_alone(pipe: "DiffusionPipeline") -> "ModelMixin | None":
    """Return the transformer of a pipeline that loads no LoRA itself if the transformer does, as
    HunyuanVideo 1.5's; None for any other pipeline."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    transformer = getattr(pipe, "transformer", None)
    if isinstance(pipe, LoraBaseMixin) or not hasattr(transformer, "load_lora_adapter"):
        return None
    return transformer


def file_of(source: str) -> Path:
    """Return the file of a LoRA, given by itself, its folder or its repository."""
    from huggingface_hub import HfApi

    path = expanded(source)
    if path.is_file():
        return path
    if not path.exists() and (home := reachable(source)) != source:
        path = Path(home)  # in the hub's cache
    if path.is_dir():
        names = [one.name for one in path.iterdir() if one.is_file()]
    else:
        names = HfApi().list_repo_files(source)
    own = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    own = [WEIGHTS] if WEIGHTS in own else own
    if len(own) > 1:
        example = path / own[0] if path.is_dir() else f"{source}:{own[0]}"
        raise ValueError(f"{source} holds several LoRAs, {named(own)}: give one, as {example}")
    if not own:
        raise FileNotFoundError(f"there is no LoRA at {source}: it holds no file *.safetensors")
    return path / own[0] if path.is_dir() else fetched(source, own[0])


def _fits(down: Tensor, up: Tensor, layer: nn.Module) -> bool:
    """Whether the product of the two has the shape of the layer's weight, if that is known."""
    weight = getattr(layer, "weight", None)
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or not len(down):
        return False
    if weight is None:
        return False
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return True  # quantised weights are packed, so their shape tells nothing
    if not down.ndim == up.ndim == weight.ndim:
        return False
    return (up.shape[0], *down.shape[1:]) == tuple(weight.shape)
