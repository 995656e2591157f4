"""From a method's gates to what is executed: padding and phases settled, tokens counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from dyndepth.common.culprits import definition
from dyndepth.common.errors import MethodFault
from dyndepth.method import DynamicDepthMethod, Gate
from dyndepth.models.selection import UNREAD, Counts, Selection
from dyndepth.runtime.flops import Forward

Settled = bool | Selection | Tensor
"""Under ``sparse`` True, False or a Selection; under ``masked`` True, False or a mask, which may be
float and carry a gradient."""


Key = tuple[int, int, torch.device]
_fresh = itertools.count()


class Settling:
    """Both gates of a block, or who reads them: the device was asked and has its time to answer."""

    def __init__(self, found: Sequence[Settled] | Callable[[], Sequence[Settled]]) -> None:
        self._found = found

    @property
    def waiting(self) -> bool:
        """Whether the host will wait for the device to read them."""
        return callable(self._found)

    def read(self) -> tuple[Settled, Settled]:
        """The gates of attention and MLP."""
        first, second = self._found() if callable(self._found) else self._found
        return first, second


class Settler:
    """The gates of one forward. A mask that comes back for another block is settled once.

    ``least``: a forward of fewer tokens, but for single ones over a cache, computes all of them in
    any case, so that nobody need know how many are selected.
    """

    def __init__(
        self,
        method: DynamicDepthMethod,
        forward: Forward,
        masked: bool,
        device: torch.device,
        least: int = 0,
    ) -> None:
        self._method, self._forward, self._masked = method, forward, masked
        self._device = device
        # One token, on a device that does nothing behind the host's back.
        self._single = device.type == "cpu" and forward.batch * forward.width == 1
        self._unread = forward.width > 1 and forward.batch * forward.width < least
        self._generation = forward.generation if method.phases == "generation" else None
        # By identity, with the gate itself, so that no other can take its place in memory.
        self._known: dict[Key, tuple[Gate, Settled]] = {}
        self._rows: dict[tuple[bool, ...], Gate] = {}
        self._own: set[int] = set()

    def __call__(self, gates: tuple[Gate, Gate], hidden: Tensor) -> Settling:
        """Both gates of a block whose tokens are ``hidden``, ``[batch, tokens, hidden]``.

        Raises MethodFault for a gate that is none.
        """
        if self._masked:
            return Settling([self._mask(gates[0], hidden), self._mask(gates[1], hidden)])
        new: dict[Key, Gate] = {}
        found: list[Any] = []
        for gate in gates:
            if isinstance(gate, bool) and (gate or self._generation is None):
                found.append(gate)
                continue
            if not isinstance(gate, Tensor | bool):
                raise wrong_gate(self._method, gate, hidden)
            key = found[0] if gate is gates[0] and found else self._key(gate, hidden.device)
            found.append(key)
            if key not in self._known and key not in new:
                new[key] = gate
        if not new:
            return Settling([self._settled(one) for one in found])
        if self._single:
            alone = [bool(self._mask(gate, hidden)) and self._count > 0 for gate in new.values()]
            self._know(new, alone)
            return Settling([self._settled(one) for one in found])
        masks = self._real([cast(Tensor, self._mask(gate, hidden)) for gate in new.values()])
        if self._unread:
            self._know(new, [Selection(mask, UNREAD, UNREAD) for mask in masks.unbind(0)])
            return Settling([self._settled(one) for one in found])
        counts, real = Counts(masks), self._count

        def read() -> list[Settled]:
            self._know(new, Selection.of(masks, counts, real))
            return [self._settled(one) for one in found]

        return Settling(read)

    def _know(self, new: dict[Key, Gate], selected: Sequence[Selection | bool]) -> None:
        for (key, gate), selection in zip(new.items(), selected, strict=True):
            self._known[key] = (gate, selection)

    def _settled(self, one: bool | Key) -> Settled:
        return one if isinstance(one, bool) else self._known[one][1]

    def decided(self, gates: tuple[Settled, Settled]) -> tuple[bool | Selection, bool | Selection]:
        """The decisions behind settled gates, as the ledger takes them."""
        if not self._masked:
            return cast(Any, gates)
        first, second = (
            gate if isinstance(gate, (bool, Selection)) else self._decision(gate) for gate in gates
        )
        return first, second

    def _decision(self, gate: Tensor) -> bool | Selection:
        masks = self._real([gate.detach() > 0.5])
        return Selection.of(masks, Counts(masks), self._count)[0]

    def rows(self, rows: Tensor) -> Gate:
        """A gate from one decision a sequence, bool ``[batch]``; equal ones are one object."""
        pattern = tuple(rows.tolist())
        if pattern not in self._rows:
            self._rows[pattern] = self._row_gate(pattern)
        return self._rows[pattern]

    def _row_gate(self, pattern: tuple[bool, ...]) -> Gate:
        if len(set(pattern)) == 1:
            return pattern[0]
        forward = self._forward
        rows = torch.tensor(pattern, device=self._device)[:, None]
        gate = rows.expand(forward.batch, forward.width)
        if not self._masked and self._generation is None:
            # Counted here, so that the host need not wait for the device at each block.
            counts = [count * runs for count, runs in zip(self._by_row, pattern, strict=True)]
            selection = Selection.counted(self._real([gate])[0], counts, self._count)
            self._own.add(id(gate))
            self._known[self._key(gate, gate.device)] = (gate, selection)
        return gate

    def _key(self, gate: Gate, device: torch.device) -> Key:
        """What a gate is known by: a mask that was written to since is another one."""
        if isinstance(gate, bool) or id(gate) in self._own:
            return id(gate), 0, device
        # Tensors made under inference mode don't tell whether they were written to.
        version = next(_fresh) if gate.is_inference() else gate._version
        return id(gate), version, device

    def _mask(self, gate: Gate, hidden: Tensor) -> Settled:
        """A gate with prompt tokens of generation methods open, on the device of the block."""
        generation = self._generation
        if isinstance(gate, bool):
            if gate or generation is None:
                return gate
            return ~generation.to(hidden.device)
        fits = isinstance(gate, Tensor) and gate.shape == hidden.shape[:2]
        if not fits or not (gate.dtype == torch.bool or self._masked):
            raise wrong_gate(self._method, gate, hidden)
        gate = gate.to(hidden.device)
        if generation is None:
            return gate
        return torch.where(generation.to(hidden.device), gate, torch.ones_like(gate))

    def _real(self, masks: Sequence[Tensor]) -> Tensor:
        """Without padding, which is never executed: ``[masks, batch, tokens]``, copies, which the
        method can't write to."""
        valid, stacked = self._forward.valid, torch.stack(list(masks))
        return stacked if valid is None else stacked & valid.to(stacked.device)

    @cached_property
    def _by_row(self) -> list[int]:
        """Tokens of each sequence that are no padding."""
        forward = self._forward
        if forward.valid is None:
            return [forward.width] * forward.batch
        return forward.valid.sum(1).tolist()

    @cached_property
    def _count(self) -> int:
        return sum(self._by_row)


def pair(method: DynamicDepthMethod, gates: Any) -> tuple[Gate, Gate]:
    """What ``gates`` returned, as a pair. Raises MethodFault if it is none."""
    try:
        attention, mlp = gates
    except (TypeError, ValueError):
        raise MethodFault(
            f"{method.name}: gates must return those of attention and MLP, a pair, not a "
            f"{type(gates).__name__} ({definition(method.gates)})"
        ) from None
    return attention, mlp


def wrong_gate(method: DynamicDepthMethod, gate: Any, hidden: Tensor) -> MethodFault:
    """What is said of a gate for ``hidden``, ``[batch, tokens, hidden]``, that is none."""
    kind = f"{gate.dtype} {list(gate.shape)}" if isinstance(gate, Tensor) else repr(gate)
    return MethodFault(
        f"{method.name}: a gate must be a bool, or a bool tensor [batch, tokens], here "
        f"{list(hidden.shape[:2])}, not {kind} ({definition(method.gates)})"
    )
