"""Workers that run the tests of one collection: `pytest --workers 2`.

They are forked once all tests are collected, so that what the tests import is imported once. A
worker takes a file at a time, in the order of the collection, and sends its reports to the first
process, which prints them. Without fork the first process runs all.
"""

import os
import signal
import traceback
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace

import pytest
from support import cpu_seconds

INDEX = 4  # bytes of the number of a file in the pipe that all workers read


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, help="Processes that run the tests.")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    option = session.config.option
    if not option.workers or option.collectonly or session.testsfailed or not hasattr(os, "fork"):
        return None
    session.config.pluginmanager.getplugin("terminalreporter").showfspath = False
    files: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    reads, writes = os.pipe()
    os.write(writes, b"".join(i.to_bytes(INDEX, "little") for i in range(len(files))))
    os.close(writes)
    workers = [Worker(session, i, [*files.values()], reads) for i in range(option.workers)]
    try:
        while alive := {worker.sent: worker for worker in workers if worker.pid}:
            for ready in wait([*alive]):
                alive[ready].receive()
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
    finally:
        for worker in workers:
            worker.end(signal.SIGKILL)
    return True


class Worker:
    """A fork of this process, and the end of the pipe that its reports come from."""

    def __init__(
        self, session: pytest.Session, number: int, files: list[list[pytest.Item]], queue: int
    ):
        self.config, self.number = session.config, number
        self.running = "no test"
        self.sent, sending = Pipe(duplex=False)
        self.pid = os.fork()
        if not self.pid:
            try:
                Sender(session, number, sending).run(files, queue)
            except BaseException:
                sending.send(("broke", traceback.format_exc()))
            finally:
                os._exit(0)  # what is registered to run at exit is of the first process
        sending.close()

    def receive(self) -> None:
        """Pass on what the worker sent; a worker that broke off fails the run."""
        hook = self.config.hook
        try:
            kind, value = self.sent.recv()
        except EOFError:
            kind, value = "broke", "the process ended"
        if kind == "start":
            self.running = value
        elif kind == "warning":
            hook.pytest_warning_recorded.call_historic(kwargs=value)
        elif kind == "spent":
            cpu_seconds.spent.update(value)
            self.end()
        else:
            if kind == "report":
                report = hook.pytest_report_from_serializable(config=self.config, data=value)
            else:
                about = self.running, (self.running, None, self.running), {}
                report = pytest.TestReport(*about, "failed", value, "call")
                self.end(signal.SIGKILL)
            name = f"worker {self.number}"  # where pytest looks for those of pytest-xdist
            gateway = SimpleNamespace(id=name)
            report.node = SimpleNamespace(gateway=gateway, _workerinfocache=f"[{name}]")
            hook.pytest_runtest_logreport(report=report)

    def end(self, by: signal.Signals | None = None) -> None:
        """Wait for its end, or bring it about by a signal."""
        if self.pid:
            if by is not None:
                os.kill(self.pid, by)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Sender:
    """A plugin of a worker, which sends what the first process prints."""

    def __init__(self, session: pytest.Session, number: int, connection: Connection):
        self.config, self.connection = session.config, connection
        plugins = self.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        plugins.register(self)
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()  # its files are those of the first process
        capture.start_global_capturing()
        folders = self.config._tmp_path_factory
        folders._basetemp = folders.getbasetemp() / f"worker-{number}"
        folders._basetemp.mkdir()

    def run(self, files: list[list[pytest.Item]], queue: int) -> None:
        """Run a file after the other, as long as there are any that nobody took."""
        taken = self.take(files, queue)
        while taken:
            following: list[pytest.Item] = []
            for item, after in zip(taken, [*taken[1:], None], strict=True):
                if after is None:
                    following = self.take(files, queue)
                    after = following[0] if following else None
                self.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            taken = following
        self.connection.send(("spent", dict(cpu_seconds.spent)))

    @staticmethod
    def take(files: list[list[pytest.Item]], queue: int) -> list[pytest.Item]:
        number = os.read(queue, INDEX)
        return files[int.from_bytes(number, "little")] if number else []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.connection.send(("start", nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.connection.send(("report", data))

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        place = warning_message.filename, warning_message.lineno
        told = warnings.WarningMessage(UserWarning(text), UserWarning, *place)
        value = {"warning_message": told, "when": when, "nodeid": nodeid, "location": location}
        self.connection.send(("warning", value))
