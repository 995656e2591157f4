"""What a bound may know: the likeliest next token after each depth of the dense model.

The tokens of a forward are run once more at full depth, before it begins. The keys and values of
that run lie in the forward's own cache, as layers beyond the model's: whatever is done to the cache
between two forwards (crops, beams, selected rows) is done to them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import CACHE_ARGUMENTS, cache_argument
from dyndepth.runtime.cache import dense_lane, has_lane
from dyndepth.runtime.flops import Forward

_LOGITS = 2**24
"""Logits held at a time: 64 MiB in float32."""

Run = Callable[[int, Callable[..., Tensor], Tensor, dict[str, Any]], Tensor]


class Foresight:
    """Looks ahead for one attached model, at most once a forward.

    ``run`` is what each block does in forwards that are no look ahead. Hooks that others have put
    on blocks see both.
    """

    def __init__(self, parts: Decoder, run: Run) -> None:
        self._owner = parts.owner
        self._norm: nn.Module = parts.norm
        self._head: nn.Module = parts.head
        self._layers = len(parts.layers)
        self._run = run
        self._seen: list[Tensor] | None = None
        self._found: Tensor | None = None
        self._open = False

    def begin(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> None:
        """A forward of the decoder begins, with these arguments and this cache or None."""
        self._forward, self._args, self._kwargs, self._cache = forward, args, kwargs, cache
        self._found, self._open = None, True

    def __call__(self) -> Tensor:
        """Likeliest next tokens, int64 ``[layers + 1, batch, tokens]``; see ``ForwardContext``.

        Raises UserError where the dense model's past is not known: a forward over this cache
        skipped something before anybody looked ahead. RuntimeError if the forward has begun.
        """
        if self._found is None:
            if not self._open:
                raise RuntimeError("foresight can be asked for in a method's start alone")
            self._found = self._look()
        return self._found

    def end(self, full: bool) -> None:
        """The method has decided; ``full`` says that all will run.

        Keeps the dense model's past at hand for later forwards, or remembers that it is lost.
        """
        if self._found is None and self._cache is not None:
            if has_lane(self._cache, self._layers):
                self()
            elif not full:
                self._cache.thinned = True
        # A method may keep its context; it shall not keep the cache with it.
        self._open, self._args, self._kwargs, self._cache = False, (), {}, None

    @torch.no_grad()
    def _look(self) -> Tensor:
        kwargs = {name: self._kwargs[name] for name in self._kwargs if name not in CACHE_ARGUMENTS}
        if self._cache is not None:
            past = self._forward.keys - self._forward.width
            thinned = past and getattr(self._cache, "thinned", False)
            if thinned and not has_lane(self._cache, self._layers):
                raise UserError(
                    "foresight needs the dense model's past, and an earlier forward over this "
                    "cache skipped without looking ahead; ask for it in start, in every forward"
                )
            kwargs[cache_argument(self._owner)] = dense_lane(self._cache, self._layers)
        self._forward.foresight = True
        self._seen = seen = list[Tensor]()
        try:
            # Not by calling the module: its hooks belong to the forward that is about to run.
            normed = self._owner.forward(*self._args, **kwargs)[0]
        finally:
            self._seen = None
        return torch.stack([*seen, self._likeliest(normed)])

    def block(
        self,
        index: int,
        stock: Callable[..., Tensor],
        hidden: Tensor,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The forward of one block: the stock one while looking ahead, ``run``'s otherwise."""
        if self._seen is None:
            return self._run(index, stock, hidden, arguments)
        self._seen.append(self._likeliest(self._norm(hidden)))
        return stock(hidden, **arguments)

    def _likeliest(self, normed: Tensor) -> Tensor:
        """``[batch, tokens, hidden]``, through the final norm, to int64 ``[batch, tokens]``."""
        rows = normed.flatten(0, 1)
        vocabulary = self._head.get_parameter("weight").shape[0]
        parts = rows.split(max(1, _LOGITS // vocabulary))
        return torch.cat([self._head(part).argmax(-1) for part in parts]).view(normed.shape[:2])
