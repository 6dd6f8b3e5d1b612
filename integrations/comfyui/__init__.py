"""Nodes that ComfyUI finds in this folder of `custom_nodes`."""

from . import (
    estimate_nodes,
    extend_nodes,
    gate_nodes,
    lora_nodes,
    method_nodes,
    nodes,
    preset_nodes,
)

_FILES = (nodes, lora_nodes, gate_nodes, preset_nodes, extend_nodes, estimate_nodes, method_nodes)
NODE_CLASS_MAPPINGS = {
    key: one for file in _FILES for key, one in file.NODE_CLASS_MAPPINGS.items()
}
NODE_DISPLAY_NAME_MAPPINGS = {
    key: name for file in _FILES for key, name in file.NODE_DISPLAY_NAME_MAPPINGS.items()
}
WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
