"""An object that lives in a process of its own, so that a test can have two of it, or kill it.

LMDB lets a process open a file only once, so that a test with a writer and a reader needs two processes, as in life.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from tests.running import ROOT


class Remote:
    """`Remote("package.module:Name", *arguments)` makes the object; `.call("method", …)` calls it and waits.

    Exceptions of the object are raised here. `.start` sends a call and does not wait for its answer, which `.answer`
    brings. `begun` makes the object without waiting for it.
    """

    def __init__(self, what: str, *arguments: Any, **named: Any) -> None:
        self._begin(what)
        try:
            self.call("__init__", *arguments, **named)
        except BaseException:
            self.close()
            raise

    @classmethod
    def begun(cls, what: str, *arguments: Any) -> Self:
        made = cls.__new__(cls)
        made._begin(what)
        made.start("__init__", *arguments)
        return made

    def _begin(self, what: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.other_process", what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout

    def start(self, name: str, *arguments: Any, **named: Any) -> None:
        pickle.dump((name, arguments, named), self._requests)
        self._requests.flush()

    def answer(self) -> Any:
        failed, value = pickle.load(self._answers)
        if failed:
            raise value
        return value

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        self.start(name, *arguments, **named)
        return self.answer()

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self._answers.close()


def _serve(what: str) -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    module, _, name = what.partition(":")
    made = getattr(importlib.import_module(module), name)
    value: Any = None
    while True:
        try:
            method, arguments, named = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if method == "__init__":
                value, answer = made(*arguments, **named), None
            elif callable(found := getattr(value, method)):
                answer = found(*arguments, **named)
            else:
                answer = found
            pickle.dump((False, answer), answers)
        except Exception as error:
            pickle.dump((True, error), answers)
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
