"""The command `gen-accel`: its help, and the wording of its errors."""

import re
import sys
import tempfile
import traceback as tracebacks
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click import Context

OUR_FAULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
MOST_SAID = 900  # characters of a message, of which a library may make many


class OneLineErrors(TyperGroup):
    """Group of verbs that turns errors into one line on stderr.

    Refusals by the library or the parser say what to do instead, and exit with 2. All other errors
    are faults of the program: the traceback goes to a file, and the exit status is 1.
    """

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        ctx.meta["args"] = [*args]
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            if not ctx.meta["args"]:  # the help, which is what no arguments ask for
                raise
            message = _usage(error)
        raise _ended(message, BAD_INPUT)

    def invoke(self, ctx: "Context") -> object:
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
        except _USAGE_ERROR as error:
            message = _usage(error)
        except typer.Abort:
            raise
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            message = _refusal(error)
            if message is None:
                raise _ended(_fault(error, ctx.meta["args"]), OUR_FAULT) from None
        raise _ended(message, BAD_INPUT)


class CliExit(typer.Exit):
    """The exit of a verb that ended with an error.

    Args:
        message: the error in one line.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(status)
        self.message = message


def _ended(message: str, status: int) -> CliExit:
    """Print the one line of an error, and make the exit with this status."""
    line = _line(message)
    typer.echo(f"error: {line}", err=True)
    return CliExit(line, status)


def _refusal(error: Exception) -> str | None:
    """Say what was wrong with the input or the machine; None for a fault of the program."""
    torch = sys.modules.get("torch")
    is_of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    is_of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if isinstance(error, MemoryError) or is_of_cpu or is_of_gpu:
        # On the CPU, torch has no class for it, and its message names places in its code.
        asked = re.search(r"Allocator: .*allocate ([\d.]+ \w+)", str(error))
        told = f"{asked[1]} more were asked for" if asked else _line(str(error))
        less = "ask for fewer frames, fewer pixels or a smaller model"
        return f"out of memory: {told}; {less}" if told else f"out of memory: {less}"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error) or type(error).__name__
    return None


def _fault(error: Exception, args: list[str]) -> str:
    """Write the traceback to a file, and return a line that says so."""
    from gen_accel.version import __version__

    kind, said = type(error).__name__, _line(str(error))
    told = f"{kind}: {said}" if said else kind
    lines = tracebacks.format_exception(error)
    text = f"gen-accel {__version__} {args}\n\n{''.join(lines)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="gen-accel-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write(text)
    except OSError:  # a full disk, or none to write to
        return f"a fault of gen-accel: {told}; --traceback before the verb shows where"
    return f"a fault of gen-accel, please report it with {file.name}, where it arose: {told}"


def _line(message: str) -> str:
    line = " ".join(message.split())
    if len(line) <= MOST_SAID:
        return line
    end = MOST_SAID // 3  # where the advice stands
    return f"{line[: MOST_SAID - end]} ... {line[-end:]}"


def _usage(error: Any) -> str:
    """Say what the parser refuses, and for what it says no more of, where the help is."""
    message = error.format_message()
    context = error.ctx
    if context is None or not message.startswith(("Got unexpected extra", "No such command")):
        return message
    if "?" in message:  # it names the nearest
        return message
    rule = "" if message.startswith("No") else "; values follow their options, as --prompt TEXT"
    return f"{message.removesuffix('.')}{rule}; see {context.command_path} --help"


# ClickException of the Click that typer uses.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def _leave() -> None:
    """Leave the process group of a launch. Threads that wait for other processes would be cut off
    when the interpreter ends, which can abort it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def warning_line(message: Warning | str, *where: object, **more: object) -> str:
    """Format a warning without its place in the code."""
    return f"warning: {_line(str(message))}\n"


def main() -> None:
    warnings.formatwarning = warning_line
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
            "--version", callback=_print_version, is_eager=True, help="Version of gen_accel."
        ),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Traceback of an error.")] = False,
) -> None:
    """Sparse attention that makes video diffusion models faster.

    \b
    gen-accel demo                 one clip, dense and sparse; no download
    gen-accel list                 methods with their options, kernels
    gen-accel models               the models that are served, and what of them
    gen-accel show radial --frames 33 --height 12 --width 12
    gen-accel estimate --model Wan2.1-T2V-14B --height 480 --width 832 \\
        --frames 161 --gpu 4090
    gen-accel generate --model DIR_OR_REPO --prompt "a cat surfs" \\
        --out cat.mp4 --compare
    gen-accel show --extend all --model DIR_OR_REPO --frames 161   longer video
    gen-accel tune --model DIR_OR_REPO --prompts prompts.txt --quality 28 \\
        --out preset.json
    gen-accel generate --model DIR_OR_REPO --prompt "a cat" --preset preset.json
    gen-accel train lora.yaml      a LoRA for longer videos; `cache` before
    gen-accel push LORA OWNER/NAME --dry-run       what would go to the hub
    gen-accel ui                   a web page for all of it; `serve` over HTTP
    gen-accel export LORA --out longer.safetensors     for ComfyUI
    gen-accel metrics cat.mp4      loops, drift, motion; or against a reference
    gen-accel doctor               versions, devices, what is missing

    A method says which tokens see which and changes the answer; a kernel computes it and does not.
    `gen-accel VERB --help` has examples. Tab completes verbs and options after
    `gen-accel --install-completion`.
    """
