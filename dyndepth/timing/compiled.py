"""Dense under ``torch.compile``: a second baseline, in the same rounds as dense and the method.

It makes the very calls of the stock model, in torch's mode ``default``. Where it does not compile,
or not to the end, its times are none and ``fault`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.timing.passes import Side

BACKEND = "inductor"
"""Torch's default; it needs a C++ compiler on a CPU."""
_PASSES = 4
"""Passes in which compiling has to come to an end; cached tokens grow from the first step on."""


class CompiledDense(Side):
    """Dense, compiled, on one shape. Make it inside of ``compiling`` and leave it there.

    Attributes:
        fault: why it has no times, in one line; empty if it has.
    """

    def __init__(
        self, model: nn.Module, texts: Sequence[Tensor], new_tokens: int, sample: bool = False
    ) -> None:
        super().__init__(model, None, texts, new_tokens, sample=sample)
        self.fault = ""
        try:
            self._call: Any = torch.compile(model, backend=BACKEND)
        except Exception as fault:  # noqa: BLE001 - as in run
            self.fault = _told(fault)

    def run(self) -> None:
        """As dense's, but that a failure is kept and ends all further work."""
        if self.fault:
            return
        try:
            super().run()
        except Exception as fault:  # noqa: BLE001 - whatever fails, the others' times stand
            self.fault = _told(fault)

    def settle(self) -> None:
        """Run until nothing is compiled any more, outside of the clock."""
        for _ in range(_PASSES):
            before = _graphs()
            with self.around():
                self.run()
            if self.fault or _graphs() == before:
                self.restart()  # with the texts of the others
                return
        self.fault = f"torch.compile was not done after {_PASSES} passes"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the timed rounds: compiling in them is a fault, as its time would be in theirs."""
        before = _graphs()
        yield
        if not self.fault and _graphs() != before:
            self.fault = "torch.compile compiled anew while it was timed"


@contextmanager
def compiling() -> Iterator[None]:
    """Compile from scratch inside, and forget it all afterwards. What would be run eagerly, since
    too much was compiled, is a failure here: it would pass for compiled."""
    import torch._dynamo as dynamo

    dynamo.reset()
    try:
        with dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        dynamo.reset()


def _graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _told(fault: Exception) -> str:
    """The kind of failure and the first two lines that say something: torch names the backend in
    the first, what was the matter with it in the second."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {' '.join(lines[:2])}"[:300]
