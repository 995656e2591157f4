"""From a method's gates to what is executed: padding and phases settled, tokens counted."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from dyndepth.method import DynamicDepthMethod, Gate
from dyndepth.models.selection import Selection
from dyndepth.runtime.flops import Forward

Settled = bool | Selection | Tensor
"""Under ``sparse`` True, False or a Selection; under ``masked`` True, False or a mask, which may be
float and carry a gradient."""


Key = tuple[int, int, torch.device]
_fresh = itertools.count()


class Settler:
    """The gates of one forward. A mask that comes back for another block is settled once."""

    def __init__(
        self, method: DynamicDepthMethod, forward: Forward, masked: bool, device: torch.device
    ) -> None:
        self._method, self._forward, self._masked = method, forward, masked
        self._device = device
        self._generation = forward.generation if method.phases == "generation" else None
        # By identity, with the gate itself, so that no other can take its place in memory.
        self._known: dict[Key, tuple[Gate, Settled]] = {}
        self._rows: dict[tuple[bool, ...], Gate] = {}
        self._own: set[int] = set()

    def __call__(self, gates: tuple[Gate, Gate], hidden: Tensor) -> tuple[Settled, Settled]:
        """Both gates of a block whose tokens are ``hidden``, ``[batch, tokens, hidden]``.

        Raises TypeError for a gate that is none.
        """
        if self._masked:
            return self._mask(gates[0], hidden), self._mask(gates[1], hidden)
        new: dict[Key, tuple[Gate, Tensor]] = {}
        found: list[Any] = []
        for gate in gates:
            if isinstance(gate, bool) and (gate or self._generation is None):
                found.append(gate)
                continue
            key = found[0] if gate is gates[0] and found else self._key(gate, hidden.device)
            found.append(key)
            if key not in self._known and key not in new:
                mask = cast(Tensor, self._mask(gate, hidden))
                new[key] = (gate, self._real(mask))
        if new:
            selected = Selection.of([mask for _, mask in new.values()], self._count)
            for (key, (gate, _)), selection in zip(new.items(), selected, strict=True):
                self._known[key] = (gate, selection)
        first, second = (one if isinstance(one, bool) else self._known[one][1] for one in found)
        return first, second

    def decided(self, gates: tuple[Settled, Settled]) -> tuple[bool | Selection, bool | Selection]:
        """The decisions behind settled gates, as the ledger takes them."""
        if not self._masked:
            return cast(Any, gates)
        first, second = (
            gate if isinstance(gate, (bool, Selection)) else _decision(gate) for gate in gates
        )
        return first, second

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
            selection = Selection.counted(self._real(gate), counts, self._count)
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
        if gate.shape != hidden.shape[:2] or not (gate.dtype == torch.bool or self._masked):
            raise TypeError(
                f"{self._method.name}: a gate must be a bool, or a bool tensor [batch, tokens], "
                f"here {list(hidden.shape[:2])}, not {gate.dtype} {list(gate.shape)}"
            )
        gate = gate.to(hidden.device)
        if generation is None:
            return gate
        return torch.where(generation.to(hidden.device), gate, torch.ones_like(gate))

    def _real(self, mask: Tensor) -> Tensor:
        """Without padding, which is never executed; a copy, which the method can't write to."""
        valid = self._forward.valid
        return mask.clone() if valid is None else mask & valid.to(mask.device)

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


def _decision(gate: Tensor) -> bool | Selection:
    return Selection.of([gate.detach() > 0.5], gate.numel())[0]
