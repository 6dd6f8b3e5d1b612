"""`gen-accel ui` and `gen-accel serve`."""

from pathlib import Path

import typer

from gen_accel.cli.app import app
from gen_accel.cli.verb import verb
from gen_accel.config import Config, option
from gen_accel.hub import check_pipeline, check_sources
from gen_accel.paths import check_folder_path
from gen_accel.registry import KEEP_MINUTES, LOOPBACK, check_package


class ServeConfig(Config):
    """A server of videos."""

    VERB = "serve"

    port: int = option(7860, "Server", "Port of the page.", ge=0, le=65535)
    host: str = option(
        "127.0.0.1", "Server", "Address to listen at; 0.0.0.0: all of this machine, with --auth."
    )
    auth: str | None = option(
        None,
        "Server",
        "Name, and file whose first line is the password that the server asks for, or its hash.",
        metavar="USER:FILE",
    )
    no_auth: bool = option(
        False, "Server", "No password, also where others reach the server by --host or --share."
    )
    models: tuple[str, ...] = option(
        (),
        "Server",
        "Model to choose, besides demo; may be repeated.",
        name="model",
        metavar="DIR_OR_REPO",
    )
    out: Path = option(
        Path("outputs/ui"),
        "Server",
        "Folder of the jobs and of all that they make.",
        reads=lambda folder: (),  # nothing is written there but new jobs
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

    share: bool = option(False, "Server", "A public address at gradio.live too, with --auth.")
    hub: bool = option(
        False,
        "Server",
        "Any model and LoRA of the hub by its name on the page, fetched by the job that needs it; "
        "without, those of --model and --allow alone.",
    )


@verb(app, PageConfig, short_help="A web page for all of it.")
def ui(config: PageConfig) -> None:
    """Serve a web page: generate, compare, make longer, train and measure, with a queue.

    \b
    gen-accel ui
    gen-accel ui --model models/wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    gen-accel ui --out /data/videos --allow /data/clips --port 8000
    gen-accel ui --host 0.0.0.0 --auth me:password.txt
    ssh -L 7860:localhost:7860 HOST        on your own machine, for a page on another
    """
    _serve(config, page=True, share=config.share, hub=config.hub)


@verb(app, ServeConfig, short_help="The same queue over HTTP, as OpenAI's videos.")
def serve(config: ServeConfig) -> None:
    """Serve videos over HTTP, without a page.

    \b
    gen-accel serve --model models/wan
    curl http://127.0.0.1:7860/v1/videos -H 'Content-Type: application/json' \\
        -d '{"model": "models/wan", "prompt": "a cat surfs", "size": "832x480"}'
    """
    _serve(config, page=False)


def _serve(config: ServeConfig, *, page: bool, share: bool = False, hub: bool = False) -> None:
    check_package("the web page", "gradio", extra="ui")  # which is imported after a sign of life
    from gen_accel.ui.app import Server, address, listening, run, shared

    for one in config.models:
        check_pipeline(one)
    check_sources("folder to allow", *config.allow)
    check_folder_path("out", config.out)
    host = config.host
    if config.auth and config.no_auth:
        raise ValueError("--auth asks for a password and --no-auth for none: leave one out")
    is_open = share or host not in LOOPBACK
    if is_open and not config.auth and not config.no_auth:
        opened = "--share" if share else f"--host {host}"
        raise ValueError(
            f"{opened} lets others in: give --auth USER:FILE, with a password on the first line "
            "of FILE, or --no-auth"
        )
    bound = listening(host, config.port)
    place = address(host, bound.getsockname()[1])
    typer.echo(f"starting {place}", err=True)
    if is_open and not config.auth:
        typer.echo(
            "warning: there is no password: whoever reaches this server can use the models, and "
            "read and remove what was made",
            err=True,
        )
    server = Server(
        config.out,
        models=config.models,
        allow=config.allow,
        hub=hub,
        page=page,
        host=host,
        share=share,
        auth=config.auth,
        keep=config.keep,
    )
    if share:
        public = shared(bound.getsockname()[1])
        whom = f"who knows {config.auth.partition(':')[0]}'s password" if config.auth else "at all"
        typer.echo(f"for anybody {whom}: {public}", err=True)
    typer.echo(f"{place} is ready; Ctrl-C ends it", err=True)
    run(server, bound)
