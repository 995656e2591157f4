"""Puts a function in the place of every block's forward, and takes it away again.

The class of a block is swapped for a subclass, so that hooks, output capturing and gradient
checkpointing, which look at the instance, go on working.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from dyndepth.branches import Block
from dyndepth.errors import UserError

Stock = Callable[..., Tensor]
"""A block's own forward, ``(hidden_states, **arguments) -> hidden_states``."""
Run = Callable[[int, Stock, Tensor, dict[str, Any]], Tensor]


@contextmanager
def run_by(split: Sequence[Block], run: Run) -> Iterator[None]:
    """Inside, each block's forward is ``run(index, stock forward, hidden, arguments)``.

    A hook of accelerate, which brings the inputs to the block's device, stays around it. Raises
    UserError for a block that is wrapped by somebody else.
    """
    for block in split:
        own = vars(block.layer)
        if "forward" in own and not ("_hf_hook" in own and "_old_forward" in own):
            raise UserError(
                f"block {block.index} has a forward of its own, which hides the runtime; remove "
                "what wraps it"
            )
    undo: list[Callable[[], None]] = []
    try:
        for index, block in enumerate(split):
            layer: Any = block.layer
            stock = type(layer)
            if "forward" in vars(layer):
                hooked = layer._old_forward
                undo.append(partial(setattr, layer, "_old_forward", hooked))
                layer._old_forward = partial(_running(stock, block, index, run), layer)
            else:
                undo.append(partial(setattr, layer, "__class__", stock))
                patched = {"forward": _running(stock, block, index, run)}
                layer.__class__ = type(stock.__name__, (stock,), patched)
        yield
    finally:
        for restore in undo:
            restore()


def _running(stock: type[nn.Module], block: Block, index: int, run: Run) -> Callable[..., Any]:
    """A forward, of a block of the class ``stock``, that is ``run``'s."""
    names = _positional(stock.forward)

    def own(layer: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
        out = stock.forward(layer, hidden, **arguments)
        return out[0] if block.returns_tuple else out

    def forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        out = run(index, partial(own, layer), hidden_states, arguments)
        return (out, None) if block.returns_tuple else out

    return forward


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a block's arguments, after itself and the hidden states."""
    return tuple(inspect.signature(forward).parameters)[2:]
