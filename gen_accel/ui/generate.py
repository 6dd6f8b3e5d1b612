"""The screen Generate: a prompt, and the video that it comes to."""

from typing import Any

import gradio as gr

from gen_accel.ui.page import Page, follow, refusing


def build(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=5):
            model = gr.Dropdown(
                [*page.models],
                value=page.models[0],
                label="Model",
                elem_id="gen-model",
                allow_custom_value=True,
            )
            prompt = gr.Textbox("a red square moves right", label="Prompt", elem_id="gen-prompt")
            run = gr.Button("Generate", variant="primary", elem_id="gen-run")
        with gr.Column(scale=6):
            view = follow(page, "gen")
            video = gr.HTML(elem_id="gen-video")

    def submit(model: str, prompt: str, tab: str) -> Any:
        options = {"model": model, "prompt": [prompt], "out": "{job}/video.mp4"}
        options |= {"frames": 9, "height": 48, "width": 48, "steps": 4, "preview": 2}
        return page.submit("generate", options, title=prompt, tab=tab, kind="generate").id

    def show(name: str) -> Any:
        job = page.queue.job(name)
        if job.state != "done":
            return ""
        return f'<video controls loop autoplay muted src="{page.url(job, "video.mp4")}"></video>'

    run.click(refusing(submit, 1), [model, prompt, page.tab], [view.error, view.job])
    view.ended.change(show, [view.ended], [video], show_progress="hidden")
