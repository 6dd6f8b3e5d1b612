"""Processes of their own that need not import torch and diffusers again.

They are forked from a server that has imported both, and nothing of the process that asks for
them. If there is no fork, they are started as any other.
"""

import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
IMPORTED = (
    "torch",
    "torch._dynamo",
    "accelerate",
    "peft",
    "diffusers.loaders",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers",
    "transformers.models.t5.modeling_t5",
    "gen_accel.cli.app",
    "gen_accel.lora.trainer",
    "gen_accel.pipelines.generation",
)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload([*IMPORTED])


class Forked:
    """A process that runs a module with arguments, as `python -m module` does.

    Args:
        env: its whole environment.
        folder: where it works; None for here.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        folder: Path | None = None,
    ):
        self._said = Path(tempfile.mkdtemp())
        given = module, [*arguments], {**env}, str(folder or Path.cwd()), self._said
        self._process = CONTEXT.Process(target=_become, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, or make one; stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
        out, err = ((self._said / name).read_text() for name in ("1", "2"))
        shutil.rmtree(self._said)
        return out, err


def _become(
    module: str, arguments: list[str], env: dict[str, str], folder: str, said: Path
) -> None:
    """Leave what is of the server, and run."""
    for number in (1, 2):
        with (said / str(number)).open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def ranks(
    count: int, module: str, arguments: Sequence[str], env: Mapping[str, str]
) -> list[Forked]:
    """Processes that find each other as those of `accelerate launch` on one CPU machine do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        Forked(module, arguments, {**env, **shared, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(count)
    ]
