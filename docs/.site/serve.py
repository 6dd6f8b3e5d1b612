"""Show the site at a port of this machine: `python docs/.site/serve.py 8000`."""

import os
import socket
import sys


def main(port: str) -> None:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        sys.exit(f"PORT must be from 1 to 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", int(port)))
        except OSError as error:
            sys.exit(f"port {port} cannot be had ({error.strerror}): take another, PORT=8001")
    command = [sys.executable, "-m", "mkdocs", "serve", "--dev-addr", f"localhost:{port}"]
    os.execve(sys.executable, command, {**os.environ, "NO_MKDOCS_2_WARNING": "1"})


if __name__ == "__main__":
    main(sys.argv[1])
