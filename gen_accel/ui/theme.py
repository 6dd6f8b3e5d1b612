"""The page's looks: gradio's own parts in our colours, with the fonts of the system."""

from typing import Any

import gradio as gr

FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    base = gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        font=FONT,
        font_mono=MONO,
        radius_size="md",
        spacing_size="sm",
    )
    return base.set(
        body_background_fill="*neutral_50",
        block_shadow="none",
        block_title_text_weight="600",
        block_info_text_size="*text_xs",
        button_large_text_weight="600",
    )
