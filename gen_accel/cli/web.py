"""`gen-accel ui` and `gen-accel serve`."""

from pathlib import Path

import typer

from gen_accel.cli.app import app
from gen_accel.cli.verb import verb
from gen_accel.config import Config, option
from gen_accel.hub import check_pipeline, check_sources
from gen_accel.paths import check_folder_path
from gen_accel.registry import KEEP_MINUTES, LOOPBACK


class ServeConfig(Config):
    """A server of videos."""

    VERB = "serve"

    port: int = option(7860, "Server", "Port of the page.", ge=0, le=65535)
    host: str = option(
        "127.0.0.1", "Server", "Address to listen at; 0.0.0.0: all of this machine, for anybody."
    )
    models: tuple[str, ...] = option(
        (),
        "Server",
        "Model to choose, besides demo; may be repeated.",
        name="model",
        metavar="DIR_OR_REPO",
    )
    out: Path = option(
        Path("outputs/ui"), "Server", "Folder of the jobs and of all that they make."
    )
    allow: tuple[str, ...] = option(
        (),
        "Server",
        "Folder of LoRAs or clips, or repository, that may be read too; may be repeated.",
        metavar="DIR_OR_REPO",
    )
    keep: float = option(
        KEEP_MINUTES,
        "Server",
        "Minutes that the last model stays in the computer's memory after a video; 0: none.",
        metavar="MINUTES",
        ge=0,
    )


class PageConfig(ServeConfig):
    """A server of the web page."""

    VERB = "ui"

    share: bool = option(False, "Server", "A public address at gradio.live too.")


@verb(app, PageConfig, short_help="A web page for all of it.")
def ui(config: PageConfig) -> None:
    """Serve a web page: generate, compare, make longer, train and measure, with a queue.

    \b
    gen-accel ui
    gen-accel ui --model models/wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    gen-accel ui --out /data/videos --allow /data/clips --port 8000
    ssh -L 7860:localhost:7860 HOST        on your own machine, for a page on another
    """
    _serve(config, page=True, share=config.share)


@verb(app, ServeConfig, short_help="The same queue over HTTP, as OpenAI's videos.")
def serve(config: ServeConfig) -> None:
    """Serve videos over HTTP, without a page.

    \b
    gen-accel serve --model models/wan
    curl http://127.0.0.1:7860/v1/videos -H 'Content-Type: application/json' \\
        -d '{"model": "models/wan", "prompt": "a cat surfs", "size": "832x480"}'
    """
    _serve(config, page=False, share=False)


def _serve(config: ServeConfig, *, page: bool, share: bool) -> None:
    from gen_accel.ui.app import Server, address, listening, run, shared

    for one in config.models:
        check_pipeline(one)
    check_sources("folder to allow", *config.allow)
    check_folder_path("out", config.out)
    host = config.host
    bound = listening(host, config.port)
    place = address(host, bound.getsockname()[1])
    typer.echo(f"starting {place}", err=True)
    if host not in LOOPBACK:
        typer.echo(
            f"warning: {host} is not this machine alone: whoever reaches it can use the models "
            "and read and remove what was made; there is no password",
            err=True,
        )
    server = Server(
        config.out,
        models=config.models,
        allow=config.allow,
        page=page,
        host=host,
        share=share,
        keep=config.keep,
    )
    if share:
        public = shared(bound.getsockname()[1])
        typer.echo(f"for anybody who has the address: {public}", err=True)
    typer.echo(f"{place} is ready; Ctrl-C ends it", err=True)
    run(server, bound)
