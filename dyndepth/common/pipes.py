"""Standard streams whose reader may leave before everything is said, as ``head`` does: what is said
afterwards goes nowhere, and the work goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Raw(io.FileIO):
    """A stream's file that leads into nothing as soon as nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for the processes that are started later, too
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let no reader of standard output or error that leaves end this process, or any work of it.

    Streams that something else has put in the place of the process's own stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        own = stream is not None and stream is getattr(sys, f"__{name}__")
        if not own or not isinstance(stream, io.TextIOWrapper) or stream.isatty():
            continue
        stream.flush()
        raw = _Raw(stream.fileno(), "w", closefd=False)
        buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
        patient = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, patient)
