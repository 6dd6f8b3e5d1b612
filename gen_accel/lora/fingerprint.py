"""Hashes of models and tokenizers: they change when, and only when, the results may change."""

import hashlib
import json
from typing import Any

import torch

# Fields of a configuration to leave out; the weights state their own dtype.
PASSING = ("transformers_version", "dtype", "torch_dtype")


def hash_of(value: Any) -> str:
    """Hash a value that is fit for JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def model_state(name: str, model: Any) -> str:
    """Hash a model's class, configuration and weights."""
    hooked = any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in model.modules())
    if hooked or any(x.is_meta for x in model.parameters()):
        raise ValueError(f"the {name} is offloaded: give the pipeline before that, or its folder")
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    lasting = {k: v for k, v in config.items() if not k.startswith("_") and k not in PASSING}
    tiled = getattr(model, "use_tiling", False)
    digest = hashlib.sha256(hash_of([type(model).__name__, lasting, tiled]).encode())
    for key, x in sorted(model.state_dict().items()):
        digest.update(f"{key} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def words_state(tokenizer: Any) -> str:
    """Hash how a tokenizer splits text, or that of a processor of text and pictures, without the
    padding of its last call."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return hash_of(
            [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.all_special_tokens]
        )
    rules = json.loads(backend.to_str())
    return hash_of({k: v for k, v in rules.items() if k not in ("padding", "truncation")})
