"""The command `gen-accel`: its help, and how what it refuses is said."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

BAD_INPUT, INTERRUPTED = 2, 130


class OneLineErrors(TyperGroup):
    """What the library or the parser refuses becomes one line on stderr, without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["args"] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            _leave()
            return result
        except typer.Exit:
            _leave()
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted; no file was left half written", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # nobody reads on, as in `| head`; the parser ends the program
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:
            if ctx.params.get("traceback"):
                raise
            message = str(error) or type(error).__name__
        except _USAGE_ERROR as error:
            message = error.format_message() + _what_came(error, ctx.meta["args"])
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(BAD_INPUT)


# ClickException, of whichever Click it is that typer carries.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def _what_came(error: Any, args: list[str]) -> str:
    """The value that an option refused, which the parser's own messages leave out."""
    if not isinstance(error, typer.BadParameter):
        return ""
    for name in getattr(error.param, "opts", ()):
        for i, arg in enumerate(args[:-1]):
            if arg == name:
                return f", got {args[i + 1]!r}"
    return ""


def _leave() -> None:
    """Leave the other processes of a launch. The threads that wait for them would be cut off when
    the interpreter ends, which can abort it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # terminals that know no block characters
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def _print_version(asked: bool) -> None:
    if asked:
        from gen_accel.version import __version__

        typer.echo(f"gen-accel {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Sparse attention that makes video diffusion models faster.

    \b
    gen-accel demo                 one clip, dense and sparse, side by side; no download
    gen-accel list                 methods with their options, kernels
    gen-accel models               the models that are served, and what of them
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel estimate --model Wan2.1-T2V-1.3B --height 480 --width 832 --frames 161
    gen-accel simulate neighborhood --frames 30 --height 48 --width 80 --density 0.1
    gen-accel generate --model DIR_OR_REPO --prompt "a cat surfs" --out cat.mp4 --compare
    gen-accel train lora.yaml      a LoRA for longer videos; `cache` encodes its clips before
    gen-accel metrics cat.mp4      loops, drift, motion and flicker; or against a reference
    gen-accel doctor               versions, devices, what is missing

    A method says which tokens see which and changes the answer; a kernel computes it and does not.
    `gen-accel VERB --help` has examples.
    """
