"""Keys and values of a batch where they never move, so that a recorded step finds them.

A lane serves one cache at a time, a dynamic cache of transformers: while it does, the cache's
tensors are the filled parts of the lane's buffers. Whoever reads, crops, reorders or extends the
cache by other means makes tensors of its own, which are brought back before the next step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SMALLEST = 256


def bucket(tokens: int) -> int:
    """How many keys a recorded step over ``tokens`` reads: few sizes, an eighth more at most,
    from 2,048 on."""
    step = max(_SMALLEST, (1 << tokens.bit_length()) // 16)
    return -(-tokens // step) * step


class Lane:
    """Buffers for ``batch`` sequences and ``layers`` layers, whose keys have one shape.

    Attributes:
        length: tokens in the cache before the step, which is where its keys go: int64 ``[1]``.
        valid: whether a key is no padding: bool ``[batch, capacity]``.
    """

    def __init__(self, layers: int, batch: int, device: torch.device) -> None:
        self.layers, self.batch = layers, batch
        self.length = torch.zeros(1, dtype=torch.long, device=device)
        self.valid = torch.ones(batch, 0, dtype=torch.bool, device=device)
        self._all_valid = True
        # [layers, batch, heads, capacity, size] of keys and of values, and by layer.
        self._whole: list[Tensor] = []
        self.buffers: list[tuple[Tensor, ...]] = []
        self._given: list[tuple[Tensor, ...]] = []
        self._holder: Any = lambda: None

    @property
    def capacity(self) -> int:
        """Keys that there is room for."""
        return self.valid.shape[1]

    def holds(self, cache: Any, layers: Iterable[int], length: int) -> bool:
        """Whether ``layers`` of ``cache`` are as ``give`` left them, ``length`` tokens long."""
        if self._holder() is not cache or not self._given:
            return False
        (keys, values), slots = self._given, cache.layers
        if keys[0].shape[2] != length or len(slots) < self.layers:
            return False
        return all(
            slots[index].keys is keys[index] and slots[index].values is values[index]
            for index in layers
        )

    def serves(self, cache: Any, layers: Iterable[int], length: int) -> bool:
        """Whether the ``layers`` of ``cache`` hold ``length`` tokens each, in order, and fit."""
        shape = self._whole[0][0, :, :, 0].shape if self._whole else None
        for index in layers:
            slot: Any = cache.layers[index] if index < len(cache.layers) else None
            if not (
                # One that keeps tokens in a way of its own (a window, quantised) is no lane's.
                isinstance(slot, DynamicLayer)
                and type(slot).update is DynamicLayer.update
                and slot.is_initialized
                and slot.keys is not None
                and slot.values is not None
                and slot.keys.ndim == 4
                and slot.keys.shape[2] == length
                and slot.keys.shape == slot.values.shape
                and slot.keys.device == self.length.device
                and not getattr(slot, "skipped", 0)
            ):
                return False
            shape = slot.keys[:, :, 0].shape if shape is None else shape
            if slot.keys[:, :, 0].shape != shape:
                return False
        return True

    def grow(self, capacity: int) -> None:
        """Make room; what was recorded with the old buffers must not be repeated."""
        self._release()
        self._whole, self.buffers, self._given = [], [], []
        self.valid = self.valid.new_ones(self.batch, capacity)
        self._all_valid = True

    def take(self, cache: Any, layers: Iterable[int], length: int) -> bool:
        """Bring ``layers`` of ``cache``, of ``length`` tokens, into the buffers, of which it then
        holds parts. Returns whether anything had to be copied."""
        moved = False
        if self._holder() is not cache:
            self._release()
            self._holder = weakref.ref(cache)
        for index in layers:
            slot = cache.layers[index]
            if not self._whole:
                self._make(slot.keys)
            for buffers, name in zip(self.buffers, ("keys", "values"), strict=True):
                own, buffer = getattr(slot, name), buffers[index]
                if own.data_ptr() != buffer.data_ptr() or own.stride() != buffer.stride():
                    buffer[:, :, :length].copy_(own)
                    buffer[:, :, length:].zero_()
                    setattr(slot, name, buffer[:, :, :length])  # its own memory is free from here
                    moved = True
        return moved

    def at(self, length: int, mask: Tensor | None) -> None:
        """Before a step behind ``length`` tokens; ``mask`` is bool or int ``[batch, length + 1]``,
        or None where nothing is padded."""
        self.length.fill_(length)
        if mask is not None:
            self.valid[:, : length + 1].copy_(mask)
        elif not self._all_valid:
            self.valid.fill_(True)
        self._all_valid = mask is None

    def give(self, cache: Any, layers: Iterable[int], length: int) -> None:
        """Have ``layers`` of ``cache`` hold the first ``length`` tokens of the buffers."""
        self._given = [whole[:, :, :, :length].unbind(0) for whole in self._whole]
        if not self._given:
            return
        keys, values = self._given
        for index in layers:
            slot = cache.layers[index]
            slot.keys, slot.values = keys[index], values[index]

    def view(self, keys: int) -> LaneView:
        """The lane as a cache of which ``keys`` are read."""
        return LaneView(self, keys)

    def _make(self, like: Tensor) -> None:
        """Buffers for keys and values such as ``like``, ``[batch, heads, tokens, size]``."""
        size = (self.layers, self.batch, like.shape[1], self.capacity, like.shape[3])
        with torch.inference_mode(False):
            self._whole = [torch.zeros(size, dtype=like.dtype, device=like.device) for _ in "kv"]
        self.buffers = [whole.unbind(0) for whole in self._whole]

    def _release(self) -> None:
        """Leave the cache that is served with tensors of its own."""
        cache = self._holder()
        self._holder, self._given = lambda: None, []
        if cache is None or not self._whole:
            return
        for slot, keys, values in zip(cache.layers, *self.buffers, strict=False):
            if not slot.is_initialized:
                continue
            if slot.keys.data_ptr() == keys.data_ptr():
                slot.keys = slot.keys.clone()
            if slot.values.data_ptr() == values.data_ptr():
                slot.values = slot.values.clone()


class LaneView:
    """What a recorded step takes for a cache: keys go where the lane's ``length`` says."""

    def __init__(self, lane: Lane, keys: int) -> None:
        self._lane, self._keys = lane, keys

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Put in one token's ``[batch, heads, 1, size]``; gives ``[batch, heads, keys, size]``."""
        for buffers, new in zip(self._lane.buffers, (keys, values), strict=True):
            buffers[layer].index_copy_(2, self._lane.length, new)
        return self.read(layer)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that ``update`` gives."""
        keys, values = (buffers[layer][:, :, : self._keys] for buffers in self._lane.buffers)
        return keys, values

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive, ``[batch, 1, 1, keys]``: the step's own token and those before that are no
        padding."""
        lane = self._lane
        seen = torch.arange(self._keys, device=lane.length.device) <= lane.length
        seen = (seen & lane.valid[:, : self._keys])[:, None, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)
