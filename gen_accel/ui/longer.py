"""The screen Longer."""

import gradio as gr

from gen_accel.ui.page import Page


def build(page: Page) -> None:
    gr.Markdown("In the making.")
