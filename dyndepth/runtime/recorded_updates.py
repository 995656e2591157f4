"""What a method says of updates, in a decode step that is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dyndepth.models.selection import Selection
from dyndepth.runtime.flops import Bill, Forward
from dyndepth.runtime.updates import Updates


def unrecordable(method: Any) -> str | None:
    """Why no step under ``method`` can be recorded; None if they can."""
    if (method.substitutes or method.weighs) and not method.capturable:
        return f"{method.name} has `instead` or `weights` and does not say that it is capturable"
    return None


class Told:
    """The updates of one method and one recording at ``place``, a ``steps.Place``: ``instead`` and
    ``weights`` as the device does them. They are first asked for in ``forward``."""

    def __init__(self, updates: Updates, place: Any, forward: Forward) -> None:
        self.substitutes = updates.substitutes
        self._updates, self._place, self._forward = updates, place, forward
        self._weighed: dict[int, tuple[bool, bool]] = {}
        self._billed: dict[tuple[int, int], list[Bill]] = {}
        self._billed_weights: dict[int, list[Bill]] = {}
        # So that no tensor that was recorded is let go: what the method had then.
        self._alive = dict(vars(updates.method))

    def weigh(self, layer: int, gates: tuple[Any, Any]) -> None:
        """Ask for the factors of a block, behind its gates, and keep them where steps find them."""
        if not self._updates.weighs:
            return
        before = len(self._forward.bills)
        found = self._updates.weights(self._forward, layer, gates, self._place.hidden)
        self._billed_weights[layer] = self._forward.bills[before:]
        first, second = found or (None, None)
        self._weighed[layer] = first is not None, second is not None
        for sublayer, factor in enumerate((first, second)):
            if factor is not None:
                self._place.factors[layer, sublayer].copy_(factor)

    def weighted(self, layer: int, sublayer: int, branch: Tensor) -> Tensor:
        """A branch ``[batch, 1, hidden]`` times its factors."""
        if not self._weighed.get(layer, (False, False))[sublayer]:
            return branch
        return branch * self._place.factors[layer, sublayer][..., None]

    def instead(
        self, layer: int, sublayer: int, source: Tensor, runs: bool, mask: Tensor | None
    ) -> Tensor | None:
        """The update ``[batch, 1, hidden]`` in place of a branch of ``source``, which runs for the
        sequences of a mask, if there is one; None where all execute it or there is none."""
        if not self.substitutes or (runs and (mask is None or mask is self._place.always)):
            return None
        before = len(self._forward.bills)
        rows = source.flatten(0, 1)
        update = self._updates.instead(self._forward, layer, sublayer, rows, None)
        self._billed[layer, sublayer] = self._forward.bills[before:]
        return None if update is None else update.view_as(source)

    def bills(self, settled: Sequence[tuple[Any, Any]]) -> list[Bill]:
        """What a step bills beside its gates, whose ``settled`` ones are those of all blocks.

        Raises TypeError for a bill that names tokens, which are others each time.
        """
        found = [bill for each in self._billed_weights.values() for bill in each]
        rows = self._place.lane.batch
        asked = [bill for each in self._billed.values() for bill in each]
        if any(bill.tokens is not None for bill in (*found, *asked)):
            raise TypeError(
                f"{self._updates.method.name} is capturable, but bills for some of the tokens"
            )
        for (layer, sublayer), bills in self._billed.items():
            gate = settled[layer][sublayer]
            if gate is True:
                continue
            skip = ~gate.mask if isinstance(gate, Selection) else None
            found += [Bill(bill.cause, bill.flops_per_token, skip, rows) for bill in bills]
        return found
