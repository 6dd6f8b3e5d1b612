"""The page's looks: gradio's own parts in our colours, with the fonts of the system."""

from typing import Any

import gradio as gr

FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    return gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        font=FONT,
        font_mono=MONO,
    ).set(block_border_width="1px", block_shadow="none", section_header_text_weight="600")
