"""Whether an attached method skipped anything, and why not.

Watched on the host alone, until something was skipped: nothing here asks the device.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import TYPE_CHECKING

from dyndepth.common.errors import NothingSkipped
from dyndepth.models.selection import UNREAD

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.runtime.flops import Forward
    from dyndepth.runtime.trace import Trace


class Idle:
    """Sees the forwards of one attachment.

    Attributes:
        skipped: whether a token was seen to skip a sublayer.
    """

    def __init__(self, method: DynamicDepthMethod) -> None:
        self._method = method
        self.skipped = False
        self._forwards = self._prompts = self._padded = 0
        self._unread = False

    def see(self, forward: Forward) -> None:
        """Take a forward that has completed; of a method that speculates, only drafts count."""
        if self._method.speculates and not forward.draft:
            return
        self._forwards += 1
        self._padded += forward.valid is not None
        whole_prompt = forward.phase == "prompt" and forward.generation is None
        if whole_prompt and self._method.phases == "generation":
            self._prompts += 1
            return
        for _, *gates in forward.calls:
            for gate in gates:
                if gate is True:
                    continue
                if gate is False or gate.count != UNREAD:
                    self.skipped = True
                    return
                self._unread = True

    def warn(self, trace: Trace, layers: int) -> None:
        """Warn, at the end of the ``with`` block of ``attach``, if forwards ran, the method was
        meant to skip on a model of ``layers`` blocks or drafted, and nothing was skipped."""
        method = self._method
        if self.skipped or not self._forwards:
            return
        # A draft of the whole model does not only save nothing: it costs.
        meant = method.target_speedup > 1.0 and method.max_speedup(layers) > 1.0
        if not meant and not method.speculates:
            return
        if self._unread and _less(trace, method.speculates):
            return
        warnings.warn(f"{method.name} skipped nothing: {self._reason(trace)}", NothingSkipped, 4)

    def _reason(self, trace: Trace) -> str:
        if self._padded == self._forwards and not trace.totals()["tokens"]:
            return "every token was padding; look at the attention_mask"
        if self._prompts == self._forwards:
            names = {field.name for field in fields(self._method)}
            other = ", or take phases='both'" if "phases" in names else ""
            return f"its phases are 'generation' and every forward was a prompt; generate{other}"
        if self._method.speculates:
            remedy = "name one that does"
            if self._method.target_speedup == 1.0:
                remedy = "ask for a target speedup above 1"
            return f"the draft leaves nothing out, so it can only cost; {remedy}"
        asked = self._forwards - self._prompts
        return (
            f"in all {asked} forwards in which it was asked, every token executed every block; fit "
            "it to this model, or look at its threshold"
        )


def _less(trace: Trace, in_drafts: bool) -> bool:
    """Whether the ledger, which waits for the device, knows of something skipped."""
    if not in_drafts:
        return bool((trace.executed() < 1.0).any())
    executed, dense = trace.drafts()
    return executed < dense
