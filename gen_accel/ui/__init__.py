"""The web page of `gen-accel ui`, and the HTTP interface of `gen-accel serve`.

A screen is a file with `build(page)`, which is called inside its tab, and a line in
`screens.SCREENS`. It has no logic of its own: what it does is a verb of the command line.

- **Submit** a job with `page.submit(verb, options, title=, tab=, kind=, given=)`. Options have the
  names of a file of --config. "{job}" in `out`, `json` and other options that name what is written
  is the job's own folder: `"out": "{job}/video.mp4"`. What lies there is removed where a job is
  stopped or fails, so that a verb which goes on later, such as a training, writes elsewhere in
  `page.places.folder`.
  `given` names files by option that are copied into the job's folder. `tab` is the value of
  `page.tab`, an input of the event.
- **Follow** it with `view = follow(page, PREFIX)`, which builds `#PREFIX-progress`, `-preview`,
  `-error` and `-stop`. What submits sets `view.job` to the job's id. `view.ended.change` is where
  results are shown: `page.queue.job(id)` has the state, and what the verb printed;
  `page.queue.store.files(job)` its files, and `page.url(job, file)` their addresses.
- **Errors** are one sentence in `view.error`: wrap what submits as `refusing(function, outputs)`,
  whose first output is `view.error`. A job's own error is shown there by itself.
- **Ask at once**, beside the queue, with `page.questions.ask(verb, options)`, which returns what
  `--json -` prints, or raises `Refused` with the sentence; `known` remembers the answer.
- **State** of a screen lives in `gr.State` and in jobs, never in a module. What changes with
  jobs listens to `page.pulse.click`, with `show_progress="hidden", queue=False,
  api_visibility="private"`, and returns `gr.skip()` where nothing is new.
- Ids of parts that tests need begin with the screen's prefix: `#gen-prompt`, `#cmp-run`.

    def build(page):
        text = gr.Textbox(label="Prompt", elem_id="my-prompt")
        run = gr.Button("Run", elem_id="my-run")
        view = follow(page, "my")

        def submit(prompt, tab):
            options = {"model": "demo", "prompt": [prompt], "out": "{job}/video.mp4"}
            return page.submit("generate", options, title=prompt, tab=tab, kind="my").id

        run.click(refusing(submit, 1), [text, page.tab], [view.error, view.job])

`tests/support/browser.py` has the fixtures `web_page` (a server on a free port, with a temporary
output folder) and `browser_page` (a tab of headless Chromium on it).
"""
