"""One side of a comparison in a process of its own, which steps when it is told to.

    with Side("ours", ["-m", "bench.ppo.our_step", case.to_json()], log) as ours:
        step = ours.step()       # a dict that the child's `Turns.done` was given
        ...

The child talks over the pipe that was its standard output; whatever libraries print goes to the
log. While one side steps the others wait in a read, and use no processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kernels.limited import python_path

GO, END = "go", "end"
TAIL = 2000  # characters of a log shown when a side fails


class SideFailed(RuntimeError):
    """A child process ended before it was told to."""


class Side:
    """The parent's end.

    Args:
        name: for messages.
        arguments: of the interpreter.
        log: where the child's output goes.
        python: the interpreter.
        threads: of OpenMP and torch in the child.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, threads: int, python: str = ""
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as file:
            self._child = subprocess.Popen(
                [python or sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=python_path() | {"OMP_NUM_THREADS": str(threads)},
            )
        self.facts = self._read()  # what the child says of itself once it is ready

    def step(self) -> dict[str, Any]:
        """Have it do one step."""
        self._write(GO)
        return self._read()

    def close(self) -> None:
        """Tell it to end, and see that it does."""
        if self._child.poll() is None:
            try:
                self._write(END)
                self._child.wait(timeout=60)
            except (SideFailed, subprocess.TimeoutExpired):
                self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, word: str) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(word + "\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._failed() from error

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self) -> SideFailed:
        text = self.log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        return SideFailed(f"{self.name} ended early; the end of its output:\n{text}")


class Turns:
    """The child's end: ready, then a step for every word that comes, until the last one.

    Made first of all, so that nothing a library prints is taken for an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def tell(self, found: dict[str, Any]) -> None:
        """Answer with a dict."""
        self._answers.write(json.dumps(found) + "\n")
        self._answers.flush()

    def wait(self) -> bool:
        """Whether another step is wanted; returns when that is known."""
        return sys.stdin.readline().strip() == GO
