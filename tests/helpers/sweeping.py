"""Sweeps as processes of their own, forked from a server that has the imports behind it.

A sweep proper takes a second on a tiny model; importing torch and lm-eval takes ten. The server
only imports: it never computes, so a fork of it is as good as a fresh process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "dyndepth.evaluation.evaluate",
        "dyndepth.models.loading",
    ]
)


@dataclass
class Sweep:
    """A running or finished ``python -m dyndepth.sweep``."""

    process: multiprocessing.process.BaseProcess
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait(self, seconds: float = 120) -> int:
        """Its exit status (negative: the signal that ended it)."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.out}\n{self.err}"
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return as soon as ``text`` is in its output; fail if it ends before."""
        until = time.monotonic() + seconds
        while text not in self.out:
            alive = self.process.is_alive()
            assert (alive and time.monotonic() < until) or text in self.out, self.out + self.err
            time.sleep(0.005)


def start(
    folder: Path,
    *arguments: str,
    before: Callable[[], object] | None = None,
    door: str = "dyndepth.sweep.__main__",
    **environment: str,
) -> Sweep:
    """Start a sweep in ``folder`` (its working directory); its output goes to files there.

    ``before`` can be pickled; the process calls it first. ``door``: the module of another command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_text("")
    process = CONTEXT.Process(target=_run, args=(str(folder), arguments, before, door, environment))
    process.start()
    return Sweep(process, folder)


def _run(
    folder: str,
    arguments: tuple[str, ...],
    before: Callable[[], object] | None,
    door: str,
    environment: dict[str, str],
) -> None:
    os.chdir(folder)
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} | environment)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
    # A shell that starts the tests in the background has them ignore Ctrl-C; sweeps must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    status = importlib.import_module(door).main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
