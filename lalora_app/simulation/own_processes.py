"""Call functions in new processes, which give their memory back when they end."""

import contextlib
import os
import pickle
import selectors
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any, cast

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments


class ProcessEndedError(Exception):
    """The process ended without a result, for example for want of memory."""


def answer_call() -> None:
    """Call the function on standard input; write (True, result) or (False, error) to the output.

    The main function of the process that :func:`call_in_own_processes` starts.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    function, args = pickle.load(sys.stdin.buffer)
    try:
        answer = True, function(*args)
    except Exception as error:  # of any kind; the launcher raises it again
        error.add_note(traceback.format_exc())
        answer = False, error
    pickle.dump(answer, output)
    output.close()


def _start(call: Call) -> subprocess.Popen[bytes]:
    """Start a process that calls a function."""
    code = f"from {__name__} import answer_call; answer_call()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # warnings of libraries; errors are part of the answer
        start_new_session=True,  # Ctrl-C is for the launcher, which ends this process
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # _result tells a dead one
        pickle.dump(call, pipe)
    return process


def _result(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        returned, value = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise ProcessEndedError(
            "a process that checks the run was ended from outside, perhaps for want of memory"
        ) from error
    if not returned:
        raise value
    return value


def _results(running: list[subprocess.Popen[bytes]]) -> list[Any]:
    """Return the results in the order of the processes; an error is raised when it arrives."""
    found: dict[int, Any] = {}
    with selectors.DefaultSelector() as selector:
        for index, process in enumerate(running):
            selector.register(cast(IO[bytes], process.stdout), selectors.EVENT_READ, index)
        while len(found) < len(running):
            key, _ = selector.select()[0]
            found[key.data] = _result(running[key.data])
            selector.unregister(key.fileobj)
    return [found[index] for index in range(len(running))]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def call_in_own_processes(*calls: Call) -> list[Any]:
    """Return the result of each call, computed in new processes at the same time.

    Args:
        calls: pairs of a function of a module and its arguments; arguments, results and errors can
            be pickled.

    Raises:
        ProcessEndedError: if a process was ended from outside.
        Exception: the error of the call that fails first; the others are ended.
    """
    running: list[subprocess.Popen[bytes]] = []
    try:
        running.extend(map(_start, calls))
        return _results(running)
    finally:
        for process in running:
            _end(process)
