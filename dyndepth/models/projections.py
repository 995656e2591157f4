"""Queries of the selected tokens, keys and values of all: what token gates ask of an attention.

Architectures differ in whether these are three linear maps or one. One fused map is used in parts
where that is the same arithmetic; where it is wrapped by somebody else (an adapter, a hook, a
parametrised, quantised or offloaded weight), it is called whole and its result is taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from dyndepth.common.errors import UserError
from dyndepth.models.watching import watched

Layout = Literal["blocks", "heads"]
"""Of a fused map's output: all queries, all keys, all values; or query, key, value of each head."""
KeysValues = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values ``[batch, tokens, key size]`` of all tokens, and the queries of all where one map
that can't be divided made them along."""


def linear_flops(modules: Sequence[Any]) -> int:
    """FLOPs a token of all linear maps inside modules, adapters included."""
    maps = (m for module in modules if isinstance(module, nn.Module) for m in module.modules())
    return sum(
        2 * m.in_features * m.out_features if isinstance(m, nn.Linear) else 2 * m.weight.numel()
        for m in maps
        if isinstance(m, (nn.Linear, Conv1D))
    )


@dataclass(frozen=True)
class Separate:
    """One linear map each."""

    query: Any
    key: Any
    value: Any

    def keys_values(self, normed: Tensor) -> KeysValues:
        """Keys and values of ``[batch, tokens, hidden]``."""
        return self.key(normed), self.value(normed), None

    def queries(self, normed: Tensor, index: Tensor | None, made: Tensor | None) -> Tensor:
        """Queries ``[n, query size]`` of the tokens ``index``, int64 ``[n]``; None: of all.

        ``made`` are those that ``keys_values`` made along.
        """
        return self.query(_rows(normed, index))

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs a token of its query, and of its key and value."""
        return linear_flops([self.query]), linear_flops([self.key, self.value])


@dataclass
class Fused:
    """One linear map for all three; ``heads`` of queries, each of ``size``.

    ``divided`` says that parts of it are computed alone. That is settled when it is made: the
    ledger's costs follow from it.
    """

    module: Any
    layout: Layout
    heads: int
    size: int
    divided: bool = field(init=False)

    def __post_init__(self) -> None:
        self.divided = self._divisible

    @property
    def _key_size(self) -> int:
        """Size of all keys of a token, as of all values."""
        out = self.module.nf if isinstance(self.module, Conv1D) else self.module.out_features
        return (out - self.heads * self.size) // 2

    @property
    def _divisible(self) -> bool:
        """Whether the weight is at hand, plain, and nobody watches the map being called."""
        return (
            type(self.module) in (nn.Linear, Conv1D)
            and type(self.module.weight) is nn.Parameter
            and not self.module.weight.is_meta
            and not watched(self.module)
        )

    def keys_values(self, normed: Tensor) -> KeysValues:
        """As ``Separate``. Raises UserError if the map was wrapped since this was made."""
        if self.divided and not self._divisible:
            raise UserError(
                "a hook or another weight was put on an attention's map of queries, keys and "
                "values while a method is attached; put it there before attach"
            )
        if not self.divided:
            queries, keys, values = self._apart(self.module(normed))
            return keys, values, queries
        both = self._part(normed.flatten(0, 1), first=False).unflatten(0, normed.shape[:2])
        if self.layout == "blocks":
            keys, values = both.chunk(2, -1)
        else:
            keys, values = both.unflatten(-1, (self.heads, 2, self.size)).unbind(-2)
            keys, values = keys.flatten(-2), values.flatten(-2)
        return keys, values, None

    def queries(self, normed: Tensor, index: Tensor | None, made: Tensor | None) -> Tensor:
        """As ``Separate``."""
        if self.divided:
            return self._part(_rows(normed, index), first=True)
        return _rows(self._apart(self.module(normed))[0] if made is None else made, index)

    @property
    def flops(self) -> tuple[int, int]:
        """As ``Separate``; a map that can't be divided is all done for the keys and values."""
        whole = linear_flops([self.module])
        if not self.divided:
            return 0, whole
        query = self.heads * self.size
        query_flops = whole * query // (query + 2 * self._key_size)
        return query_flops, whole - query_flops

    def _apart(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.layout == "heads":
            parts = whole.unflatten(-1, (self.heads, 3, self.size)).unbind(-2)
            queries, keys, values = (part.flatten(-2) for part in parts)
            return queries, keys, values
        sizes = [self.heads * self.size, self._key_size, self._key_size]
        queries, keys, values = whole.split(sizes, -1)
        return queries, keys, values

    def _part(self, rows: Tensor, first: bool) -> Tensor:
        """The queries (``first``), or keys and values, of ``[n, hidden]``."""
        module = self.module
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        bias = module.bias
        if self.layout == "blocks":
            end = self.heads * self.size
            part = slice(end) if first else slice(end, None)
            return linear(rows, weight[part], None if bias is None else bias[part])
        # By head, so that the weight is read where it lies and not copied.
        shape, part = (self.heads, 3, self.size), slice(1) if first else slice(1, None)
        maps = weight.unflatten(0, shape)[:, part].flatten(1, 2).transpose(1, 2)
        out = rows.expand(self.heads, *rows.shape) @ maps
        if bias is not None:
            out = out + bias.view(shape)[:, part].flatten(1)[:, None]
        return out.transpose(0, 1).flatten(1)


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    """``[batch, tokens, size]`` as rows: those of the tokens ``index``, or all."""
    rows = states.flatten(0, 1)
    return rows if index is None else rows.index_select(0, index)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of the leading dimensions that the tables cover, halves paired."""
    size = cosine.shape[-1]
    turned = states if size == states.shape[-1] else states[..., :size]
    half = size // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = (turned * cosine + swapped * sine).to(states.dtype)
    return turned if size == states.shape[-1] else torch.cat((turned, states[..., size:]), dim=-1)
