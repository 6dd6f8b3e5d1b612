"""Signals that end a run."""

import os
import pty
import signal
import threading

import pytest

from gen_accel.process import SignalExit, answered, leave_closed_terminal, unwinding

NUMBERS = (signal.SIGTERM, signal.SIGHUP)


def ended(kinds, before=signal.SIG_DFL):
    """A process with `before` as handlers, sent signals within: how it ended, and what it said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in NUMBERS:
            signal.signal(number, before)
        with unwinding():
            try:
                with unwinding():
                    for i, kind in enumerate(kinds):
                        try:
                            os.kill(os.getpid(), kind)
                        except SignalExit:
                            os.write(write, b"raised ")
                            if i == len(kinds) - 1:
                                raise
            finally:
                os.write(write, b"tidied")
        os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 100):
        said += part
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@pytest.mark.parametrize("number", NUMBERS)
def test_it_unwinds_and_ends_by_the_same_signal(number):
    assert ended([number]) == (-number, "raised tidied")


def test_a_second_one_ends_at_once():
    assert ended([signal.SIGTERM, signal.SIGTERM]) == (-signal.SIGTERM, "raised ")


def test_what_nohup_ignores_is_ignored():
    assert ended([signal.SIGHUP], signal.SIG_IGN) == (0, "tidied")


def test_other_handlers_stay(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with unwinding():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.SIGTERM in answered()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in answered()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_other_threads_go_on_without():
    done = []

    def work():
        with unwinding():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def test_a_closed_terminal_is_left():
    """The shell is gone: what is said to it must not end the run."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        master, terminal = pty.openpty()
        os.dup2(terminal, 1)
        os.dup2(write, 2)
        leave_closed_terminal()
        alive = os.isatty(1)
        os.close(master)
        try:
            os.write(1, b"lost")
            said = b"no error, "
        except OSError:
            said = b"closed, "
        leave_closed_terminal()
        os.write(1, b"nowhere")
        os.write(2, said + (b"left" if alive else b"too early"))
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    assert os.read(read, 100) == b"closed, left"
    os.close(read)
