"""What a method puts in the place of skipped updates, and its factors on those that are executed.

For methods with ``instead`` or ``weights`` alone: no other is asked, and pays for, any of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.common.culprits import definition
from dyndepth.common.errors import MethodFault
from dyndepth.method import ATTENTION, MLP, SUBLAYERS, DynamicDepthMethod, Gate
from dyndepth.models.blocks import Ahead
from dyndepth.models.selection import UNREAD, Selection
from dyndepth.runtime.flops import Forward
from dyndepth.runtime.gates import Settled
from dyndepth.runtime.sublayers import Executor, Weights, added


class Updates:
    """Asks one method.

    Attributes:
        method: that one.
        substitutes, weighs: whether ``instead`` and ``weights`` are asked at all, as the method
            said when this was made.
    """

    def __init__(self, method: DynamicDepthMethod) -> None:
        self.substitutes, self.weighs = method.substitutes, method.weighs
        self.method = method

    def weights(
        self, forward: Forward, layer: int, gates: tuple[Gate, Gate], hidden: Tensor
    ) -> Weights | None:
        """Factors for a block whose gates were asked for, with ``hidden`` at its entry; None where
        there are none.

        They are 1 for tokens of a phase in which the method does not skip. Raises MethodFault for
        what is no pair of factors.
        """
        if gates[ATTENTION] is False and gates[MLP] is False:
            return None
        generation = None
        if self.method.phases == "generation":
            generation = forward.generation
            if generation is None and forward.phase == "prompt":
                return None
        found: Any = self.method.weights(layer)
        if not (isinstance(found, (tuple, list)) and len(found) == 2):
            raise self._wrong_weight(layer, f"one {_kind(found)}", hidden)
        if found[ATTENTION] is None and found[MLP] is None:
            return None
        first, second = (self._weight(layer, each, hidden, generation) for each in found)
        return first, second

    def _weight(
        self, layer: int, weight: Any, hidden: Tensor, generation: Tensor | None
    ) -> Tensor | None:
        if weight is None:
            return None
        fits = isinstance(weight, Tensor) and weight.shape == hidden.shape[:2]
        if not (fits and weight.is_floating_point()):
            raise self._wrong_weight(layer, _kind(weight), hidden)
        weight = weight.to(hidden.device)
        if generation is None:
            return weight
        return torch.where(generation.to(hidden.device), weight, torch.ones_like(weight))

    def _wrong_weight(self, layer: int, kind: str, hidden: Tensor) -> MethodFault:
        return MethodFault(
            f"{self.method.name}: weights must return a pair of None or float [batch, tokens], "
            f"here {list(hidden.shape[:2])}, not {kind}, for block {layer} "
            f"({definition(self.method.weights)})"
        )

    def instead(
        self, forward: Forward, layer: int, sublayer: int, rows: Tensor, skip: Tensor | None
    ) -> Tensor | None:
        """The update ``[n, hidden]`` of ``rows``, in their type; None for none.

        ``skip`` is bool ``[batch, tokens]``, the tokens that the rows are computed for; None: all.
        What the method bills of the rows is billed to those. Raises MethodFault for what is no
        such update.
        """
        before = len(forward.bills)
        update: Any = self.method.instead(layer, sublayer, rows)
        for bill in forward.bills[before:]:
            if bill.tokens is None:
                bill.tokens, bill.rows = skip, len(rows)
        if update is None:
            return None
        if not (
            isinstance(update, Tensor) and update.shape == rows.shape and update.is_floating_point()
        ):
            raise MethodFault(
                f"{self.method.name}: instead must return None or a float tensor "
                f"[n, hidden], here {list(rows.shape)}, not {_kind(update)}, for the "
                f"{SUBLAYERS[sublayer]} of block {layer} ({definition(self.method.instead)})"
            )
        return update.to(rows)


@dataclass(frozen=True)
class Updating(Executor):
    """Executes blocks for a method that says something of their updates."""

    updates: Updates

    def __call__(
        self,
        forward: Forward,
        index: int,
        hidden: Tensor,
        gates: tuple[Settled, Settled],
        arguments: dict[str, Any],
        ahead: Ahead | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """As ``Executor``; both gates may be True where there are ``weights``."""
        block, entered = self.blocks[index], hidden
        (attention, mlp), factors = gates, weights or (None, None)
        update = self._instead(forward, index, ATTENTION, hidden, attention)
        branch = self.attention(forward, block, hidden, attention, arguments, ahead)
        if branch is not None:
            branch = _weighted(branch, attention, factors[ATTENTION])
            hidden = added(hidden, branch, attention, owned=False)
        hidden = _put(hidden, update, attention)
        source = entered if block.parallel else hidden
        update = self._instead(forward, index, MLP, source, mlp)
        branch = self.mlp(forward, block, source, mlp)
        if branch is not None:
            branch = _weighted(branch, mlp, factors[MLP])
            hidden = added(hidden, branch, mlp, owned=hidden is not entered)
        return _put(hidden, update, mlp)

    def _instead(
        self, forward: Forward, index: int, sublayer: int, source: Tensor, gate: Settled
    ) -> Tensor | None:
        """The update in place of a branch of ``source``: ``[n, hidden]`` of the tokens that skip
        it where it is known how many they are, else of all tokens."""
        if gate is True or not self.updates.substitutes:
            return None
        rows, skip = source.flatten(0, 1), None
        if isinstance(gate, Selection):
            skip = ~gate.mask
            if gate.count != UNREAD:
                rows = rows.index_select(0, gate.rest)
        return self.updates.instead(forward, index, sublayer, rows, skip)


def _weighted(branch: Tensor, gate: Settled, weight: Tensor | None) -> Tensor:
    """A branch, as ``added`` takes it, times the factors of its tokens."""
    if weight is None:
        return branch
    weight = weight.to(branch.dtype)
    if branch.ndim == 2:
        assert isinstance(gate, Selection)
        weight = weight.flatten().index_select(0, gate.index)
    return branch * weight[..., None]


def _put(hidden: Tensor, update: Tensor | None, gate: Settled) -> Tensor:
    """The stream with what ``_instead`` found."""
    if update is None:
        return hidden
    if isinstance(gate, Selection) and gate.count != UNREAD:
        return hidden.flatten(0, 1).index_add(0, gate.rest, update).view_as(hidden)
    update = update.view_as(hidden)
    if isinstance(gate, Selection):
        return gate.put(hidden + update, hidden)
    if isinstance(gate, bool):
        return hidden + update
    return hidden + update * (1 - gate.to(update.dtype))[..., None]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_kind, value))})"
    return repr(value)
