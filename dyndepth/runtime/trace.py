"""What an attached model executed, as its caller asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.method import ForwardContext, Phase
from dyndepth.runtime.acceptance import Speculation
from dyndepth.runtime.flops import Forward, Ledger
from dyndepth.runtime.replay import Replay


def phase_of_tokens(context: ForwardContext, length: int | Tensor) -> tuple[Phase, Tensor | None]:
    """Phase of a forward under an explicit prompt length, and the mask if it holds both."""
    if isinstance(length, int) and context.valid is None and context.past_real is None:
        # Known without asking the device.
        first, last = context.past_length, context.past_length + context.tokens - 1
        if first >= length:
            return "generation", None
        return "prompt", context.positions >= length if last >= length else None
    if isinstance(length, Tensor):
        rows: Tensor = per_row(length, context.batch, "prompt lengths")
        length = rows.to(context.device)[:, None]
    generation = context.positions >= length
    seen = generation if context.valid is None else generation[context.valid]
    if bool(seen.all()):
        return "generation", None
    return "prompt", generation if bool(seen.any()) else None


def per_row(values: Any, batch: int, what: str) -> Any:
    """One value a sequence; each is repeated where the batch is a multiple (beams)."""
    if values is None or len(values) == batch:
        return values
    if not len(values) or batch % len(values):
        raise UserError(f"{len(values)} {what} were given for a batch of {batch} sequences")
    times = batch // len(values)
    if isinstance(values, Tensor):
        return values.repeat_interleave(times)
    return [value for value in values for _ in range(times)]


Backend = Literal["sparse", "masked"]


class _Uncounted:
    """In the ledger's place where nothing is counted."""

    def reset(self) -> None:
        """There is nothing to forget."""

    def totals(self, *given: Any) -> NoReturn:
        """Whatever is asked for: it is not known."""
        raise RuntimeError("nothing is counted: attached with count=False")

    by_document = bill_last = executed = computed_for_all = drafts = totals
    last = property(totals)


class Trace:
    """What an attached model executed, and what the caller says about its inputs.

    Without a ledger nothing is counted, and whatever counts are asked for raises RuntimeError.

    Attributes:
        documents: one id a sequence of the next forwards, for FLOPs by document and for methods
            that are deterministic by document. A batch that is a multiple (beams, several returned
            sequences) repeats each id.
        prompt_length: tokens of each sequence that belong to the prompt phase, an int or int64
            ``[batch]``. None: a forward without a past is prompt, one that extends a cache is
            generation.
        reading: whether ``readout`` is at work, whose rows are billed already.
        drafting, verifying: whether the next forwards are drafts of a method that speculates, or
            verify one.
        speculation: what its drafts came to, since the last ``reset``.
        replay: what has verifications watched, for a method that ``reads_states``; else None.
    """

    def __init__(self, ledger: Ledger | None, head: Callable[[Tensor], Tensor]) -> None:
        self.documents: Sequence[str] | None = None
        self.prompt_length: int | Tensor | None = None
        self.reading = False
        self.drafting = self.verifying = False
        self._verification: Forward | None = None
        self.speculation = Speculation()
        self.replay: Replay | None = None
        self._ledger: Any = _Uncounted() if ledger is None else ledger
        self._head = head
        self.totals: Callable[..., dict[str, Any]] = self._ledger.totals
        self.by_document: Callable[[], dict[str, dict[str, float]]] = self._ledger.by_document
        self.bill_last: Callable[..., None] = self._ledger.bill_last

    def reset(self) -> None:
        """Forget all counts."""
        self._ledger.reset()
        self.speculation = Speculation()

    def opened(self, forward: Forward) -> None:
        """A forward begins: say what it is. Of a verification nothing stands before ``reject``."""
        forward.draft = self.drafting
        if self.verifying:
            forward.rejected, self._verification = forward.width, forward

    def reject(self, tokens: int) -> None:
        """Say that of the last verification the last ``tokens`` of each sequence do not stand, and
        the others do: what those cost is billed as ``draft``."""
        if self._verification is not None:
            self._verification.rejected = tokens

    @property
    def flops(self) -> dict[str, float]:
        """Useful FLOPs by cause, and ``padding`` beside them."""
        return self._ledger.totals()["by_cause"]

    def executed(self, phase: str | None = None) -> Tensor:
        """Executed fraction of tokens, float64 ``[layers, 2]`` (attention, mlp)."""
        return self._ledger.executed(phase)

    def computed_for_all(self) -> tuple[int, int]:
        """How often a sublayer computed all tokens although its gate was not open for all of them,
        and how often there was such a gate: ``(computed, gated)``, in calls of sublayers.

        Where most tokens execute a sublayer or the forward is short, that is faster than to gather
        them; the backend ``masked`` always does it. FLOPs leave out what was so computed for nobody
        (but for ``padding``), the clock does not.
        """
        return self._ledger.computed_for_all()

    def drafts(self) -> tuple[float, float]:
        """Block FLOPs of all drafted tokens: as they were drafted, and at full depth."""
        return self._ledger.drafts()

    def gates(self) -> Tensor:
        """What the last forward executed: bool ``[batch, tokens, layers, 2]``, False on padding.

        False as well for a block that it did not call. A forward that failed is none. Raises
        RuntimeError if there is none.
        """
        last = self._ledger.last
        if last is None:
            raise RuntimeError("gates needs a forward through the attached model before it")
        return last.executed(len(self._ledger.costs.mlp))

    def readout(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of chosen positions of the last forward's final hidden state.

        ``hidden`` is ``[n, hidden]``, already through the final norm; ``rows`` int64 ``[n]`` names
        each position's sequence, which the cost is billed to. Returns ``[n, vocabulary]``.
        """
        last = self._ledger.last
        if last is None:
            raise RuntimeError("readout needs a forward through the attached model before it")
        counts = torch.bincount(rows, minlength=last.batch)
        last.heads.append((counts, hidden.shape[0]))
        self.reading = True
        try:
            return self._head(hidden)
        finally:
            self.reading = False
