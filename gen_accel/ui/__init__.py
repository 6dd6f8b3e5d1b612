"""The web page of `gen-accel ui`, and the HTTP interface of `gen-accel serve`.

A screen is a file in `screens/` with `build(page)`, which is called inside its tab, and a line in
`app.Server._add_page`. It has no logic of its own: what it does is a verb of the command line.

- **A form** is made from the config of the verb: `Form(CONFIG, PREFIX)` has a control for each
  field. `add` and `row` place those that come first, `rest` all others by their groups.
  `form.given(held)` are the options that differ from their defaults.
- **Submit** a job with `page.submit(verb, options, title=, tab=, kind=, given=)`. "{job}" in an
  option that names what is written is the job's own folder: `"out": "{job}/video.mp4"`. What lies
  there is removed if the job is stopped or fails, so that a verb which goes on later, such as a
  training, writes elsewhere in `page.places.folder`. `given` names files by option that are copied
  into the job's folder. `tab` is the value of `page.tab`, an input of the event.
- **Follow** it with `view = follow(page, PREFIX, kind=KIND)`, which builds `#PREFIX-progress`,
  `-preview`, `-error` and `-stop`. What submits sets `view.job` to the job's id.
  `view.ended.change` is when results are shown: `page.queue.job(id)` has the state, and what the
  verb printed; `page.queue.files(job)` its files, and `page.url(job, file)` their addresses.
- **Values have names**: inputs of an event are a set of components, so that the function takes
  `held`, a value by component, and returns a new value by each component that changes.
- **Errors** are one sentence: `refusing(function, view.error)` shows what `function` raises.
- **Ask at once**, beside the queue, with `page.questions.ask(verb, options)`, which returns what
  `--json -` prints, or raises `Refused` with the sentence. `known` remembers the answer, and
  `both` also returns what the verb prints for people.
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
            return {view.job: page.submit("generate", options, **about).id}

        inputs = {page.tab, *form.parts.values()}
        run.click(refusing(submit, view.error), inputs, [view.error, view.job], **ADDING)

Ids of parts begin with the screen's prefix: `#gen-prompt`, `#cmp-run`. `tests/support/browser.py`
has the fixtures `web_page` (a server on a free port, with a temporary output folder) and
`browser_page` (a tab of headless Chromium on it).
"""
