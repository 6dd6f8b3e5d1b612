"""Sparse attention of gen_accel as a diffusion attention backend of vLLM-Omni.

`register` is the entry point of the group "vllm_omni.general_plugins". It is called once in each
process, before a model is built.
"""

import logging

logger = logging.getLogger(__name__)

# vLLM-Omni's names of backends are an enumeration, and a plug-in takes the place of one. This one
# runs on Ascend NPUs alone, so that nothing is lost elsewhere.
PLACE = "RAINFUSION_ATTN"
BACKEND = "gen_accel_vllm_omni.backend.GenAccelBackend"


def register() -> None:
    """Put `GenAccelBackend` in the place of RAINFUSION_ATTN, except on NPUs, which run that."""
    from vllm_omni.diffusion.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import (  # pyright: ignore[reportMissingImports]
        current_omni_platform,
    )

    if current_omni_platform.is_npu():
        logger.warning("gen_accel: not registered, as %s is of use on NPUs", PLACE)
        return
    register_diffusion_backend(DiffusionAttentionBackendEnum[PLACE], BACKEND)
