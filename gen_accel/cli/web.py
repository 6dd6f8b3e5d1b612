"""`gen-accel ui` and `gen-accel serve`."""

from pathlib import Path
from typing import Annotated

import typer

from gen_accel.cli.app import app
from gen_accel.hub import check_pipeline, check_sources
from gen_accel.paths import check_folder_path
from gen_accel.registry import KEEP_MINUTES, LOOPBACK

Port = Annotated[int, typer.Option(help="Of the page.")]
Host = Annotated[
    str, typer.Option(help="Address to bind to. 0.0.0.0: all of this machine's, for anybody.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_REPO",
        help="A model to choose, besides demo. May be repeated.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR_OR_REPO",
        help="A folder that may be read too, of LoRAs or clips, or a repository. Repeat.",
    ),
]
Keep = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        min=0.0,
        help="How long the last model stays in the computer's memory after a video; 0: never.",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the jobs and of all that they make.")]
OUT = Path("outputs/ui")


@app.command(short_help="A web page for all of it.")
def ui(
    port: Port = 7860,
    host: Host = "127.0.0.1",
    model: Models = None,
    out: Out = OUT,
    allow: Allow = None,
    keep: Keep = KEEP_MINUTES,
    share: Annotated[
        bool, typer.Option("--share", help="Also at a public address of gradio.live.")
    ] = False,
) -> None:
    """Serve a web page: generate, compare, make longer, train and measure, with a queue.

    \b
    gen-accel ui
    gen-accel ui --model models/wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    gen-accel ui --out /data/videos --allow /data/clips --port 8000
    ssh -L 7860:localhost:7860 HOST        on your own machine, for a page on another
    """
    _serve(port, host, model, out, allow, keep, page=True, share=share)


@app.command(short_help="The same queue over HTTP, as OpenAI's videos.")
def serve(
    port: Port = 7860,
    host: Host = "127.0.0.1",
    model: Models = None,
    out: Out = OUT,
    allow: Allow = None,
    keep: Keep = KEEP_MINUTES,
) -> None:
    """Serve videos over HTTP, without a page.

    \b
    gen-accel serve --model models/wan
    curl http://127.0.0.1:7860/v1/videos -H 'Content-Type: application/json' \\
        -d '{"model": "models/wan", "prompt": "a cat surfs", "size": "832x480"}'
    """
    _serve(port, host, model, out, allow, keep, page=False, share=False)


def _serve(
    port: int,
    host: str,
    models: list[str] | None,
    out: Path,
    allow: list[str] | None,
    keep: float,
    *,
    page: bool,
    share: bool,
) -> None:
    from gen_accel.ui.app import Server, address, listening, run, shared

    for one in models or ():
        check_pipeline(one)
    check_sources("folder to allow", *(allow or ()))
    check_folder_path("out", out)
    bound = listening(host, port)
    place = address(host, bound.getsockname()[1])
    typer.echo(f"starting {place}", err=True)
    if host not in LOOPBACK:
        typer.echo(
            f"warning: {host} is not this machine alone: whoever reaches it can use the models "
            "and read and remove what was made; there is no password",
            err=True,
        )
    places = {"models": models or (), "allow": allow or ()}
    server = Server(out, **places, page=page, host=host, share=share, keep=keep)
    if share:
        public = shared(bound.getsockname()[1])
        typer.echo(f"for anybody who has the address: {public}", err=True)
    typer.echo(f"{place} is ready; Ctrl-C ends it", err=True)
    run(server, bound)
