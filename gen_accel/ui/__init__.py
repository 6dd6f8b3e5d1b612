"""The web page of `gen-accel ui`, and the HTTP interface of `gen-accel serve`.

A screen is a file in `screens/` with `build(page)`, which is called inside its tab, and a line in
`app.Server._add_page`. It has no logic of its own: what it does is a verb of the command line.

- **A form** is made from the config of the verb: `Form(CONFIG, PREFIX)` has a control for each
  field. `add` and `row` place those that come first, `rest` all others by their groups.
- **Submit** a job with `page.queue.submit(verb, options)`. "{job}" in an option that names what is
  written is the job's own folder, of which nothing is left if the job is stopped or fails.
- **Follow** it with `view = follow(page, PREFIX, kind=KIND)`. What submits sets `view.job` to the
  job's id; `view.at_end(show, parts)` shows results, from `page.queue.files(job)`. The kind is
  the id of the screen's tab, which a click in the gallery opens.
- **Values have names**: inputs of an event are a set of components, so that the function takes
  `held`, a value by component, and returns a new value by each component that changes.
- **Errors** are one sentence: `refusing(function, view.error)` shows what `function` raises.
- **Ask at once**, beside the queue, with `page.questions.ask(verb, options)`, which returns what
  `--json -` prints, or raises `Refused`.
- **HTML** is a macro in `parts.html.j2`, written by `html(MACRO, ...)`, which escapes all values.
- **State** of a screen lives in `gr.State` and in jobs, never in a module.

    def build(page):
        form = Form(GenerateConfig, "my")
        form.add("prompt")
        run = gr.Button("Run", elem_id="my-run")
        view = follow(page, "my", kind="my")

        def submit(held):
            options = {"model": "demo", **form.given(held), "out": "{job}/video.mp4"}
            about = {"title": "a video", "tab": held[page.tab], "kind": "my"}
            return {view.job: page.queue.submit("generate", options, **about).id}

        inputs = {page.tab, *form.parts.values()}
        run.click(refusing(submit, view.error), inputs, [view.error, view.job], **ADDING)

Ids of parts begin with the screen's prefix: `#gen-prompt`, `#cmp-run`. `tests/support/browser.py`
has the fixtures `web_page` (a server on a free port, with a temporary output folder) and
`browser_page` (a tab of headless Chromium on it).
"""
