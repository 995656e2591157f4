"""Puts a function in the place of every block's forward, and takes it away again.

The class of a block is swapped for a subclass, so that hooks, output capturing and gradient
checkpointing, which look at the instance, go on working. A block may be run by several at once (two
models that share it): the last to come is the first to be asked, and each may leave at any time.
The class of a decoder is swapped likewise, so that the end of each of its calls is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import Block

Stock = Callable[..., Tensor]
"""A block's own forward, ``(hidden_states, **arguments) -> hidden_states``."""
Run = Callable[[int, Stock, Tensor, dict[str, Any]], Tensor]
Checkpointed = Callable[..., Any]
"""``(index, checkpoint, function, *inputs)``, in the place of ``checkpoint(function, *inputs)``."""
_CHECKPOINT = "_gradient_checkpointing_func"  # as transformers calls it
_SAVING = ("save_pretrained", "push_to_hub")
_STOCK, _GONE = "_dyndepth_stock", "_dyndepth_gone"


class _Own(partial[Any]):
    """A forward of ours where accelerate keeps the one that it wraps."""


@contextmanager
def run_by(
    split: Sequence[Block],
    run: Run,
    *,
    checkpointed: Checkpointed | None = None,
    repeated: bool = False,
) -> Iterator[None]:
    """Inside, each block's forward is ``run(index, stock forward, hidden, arguments)``.

    A hook of accelerate, which brings the inputs to the block's device, stays around it. Where
    transformers would checkpoint a block for its gradient, ``checkpointed`` does, if there is one.
    A module that stands in several places is run as the first of them if ``repeated`` allows it.
    Raises UserError if it does not, and for a block that is wrapped by somebody else.
    """
    for first, *others in places(split).values():
        _refuse_wrapped(first, split[first].layer)
        if others and not repeated:
            raise UserError(
                f"blocks {first} and {others[0]} are one module, whose calls are not told apart "
                "here; give each a module of its own, whose weights may be the same tensors"
            )
    undo: list[Callable[[], None]] = []
    try:
        for index, *_ in places(split).values():
            block = split[index]
            layer: Any = block.layer
            stock = type(layer)
            forward = _running(stock, block, index, run)
            if "forward" in vars(layer):
                undo.append(partial(setattr, layer, "_old_forward", layer._old_forward))
                layer._old_forward = _Own(forward, layer)
            else:
                patched = _patched(stock, forward, index, checkpointed)
                undo.append(partial(_leave, layer, patched))
                layer.__class__ = patched
        yield
    finally:
        for restore in undo:
            restore()


@contextmanager
def called_in(
    module: Any,
    context: Callable[[], AbstractContextManager[None]],
    forward: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Inside, each call of ``module``, its hooks included, is made in a ``context()``.

    That ends however the call does; of torch's hooks none runs when a call is interrupted. With
    ``forward``, the module's own is ``forward(stock, *args, **kwargs)``. What torch.compile makes
    of something around the module leaves the call to Python, with all that is in it.
    """
    stock = type(module)

    @torch.compiler.disable
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with context():
            return stock.__call__(module, *args, **kwargs)

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert forward is not None
        return forward(partial(stock.forward, module), *args, **kwargs)

    patched = _subclass(stock, {"__call__": call} | ({} if forward is None else {"forward": run}))
    module.__class__ = patched
    try:
        yield
    finally:
        _leave(module, patched)


@contextmanager
def called_as(module: Any, members: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, ``module`` has these methods in the place of its own."""
    patched = _subclass(type(module), members)
    module.__class__ = patched
    try:
        yield
    finally:
        _leave(module, patched)


@contextmanager
def unsaved(modules: Sequence[Any]) -> Iterator[None]:
    """Inside, ``save_pretrained`` and ``push_to_hub`` of these modules raise UserError where they
    would save the model: not for a wrapper of peft, or a model with adapters of transformers' own,
    of which the adapters alone are saved."""

    def saving(name: str, stock: Any) -> Callable[..., Any]:
        def save(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(module, "_hf_peft_config_loaded", False):
                return getattr(stock, name)(module, *args, **kwargs)
            raise UserError(
                "a method is attached, and what would be saved is the model without it: save "
                "after the `with` block, or the model with the method by `python -m "
                "dyndepth.export`"
            )

        return save

    undo: list[Callable[[], None]] = []
    try:
        for module in {id(each): each for each in modules}.values():
            stock: Any = type(module)
            names = [name for name in _SAVING if hasattr(stock, name)]
            if names and not hasattr(stock, "get_base_model"):
                patched = _subclass(stock, {name: saving(name, stock) for name in names})
                module.__class__ = patched
                undo.append(partial(_leave, module, patched))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def places(split: Sequence[Block]) -> dict[int, list[int]]:
    """Where each module stands among the blocks, by its ``id``; mostly in one place."""
    found: dict[int, list[int]] = {}
    for index, block in enumerate(split):
        found.setdefault(id(block.layer), []).append(index)
    return found


def _refuse_wrapped(index: int, layer: nn.Module) -> None:
    own = vars(layer)
    if "forward" in own and not ("_hf_hook" in own and "_old_forward" in own):
        raise UserError(
            f"block {index} has a forward of its own, which hides the runtime; remove what wraps it"
        )
    if isinstance(own.get("_old_forward"), _Own):
        raise UserError(
            f"block {index} has a method attached through another model that shares it, and a "
            "hook of accelerate; leave that attach first"
        )
    if own.get("_compiled_call_impl") is not None:
        raise UserError(f"block {index} is compiled, which hides the runtime; attach before that")


def _patched(
    stock: type[nn.Module],
    forward: Callable[..., Any],
    index: int,
    checkpointed: Checkpointed | None,
) -> type[nn.Module]:
    """A subclass of ``stock`` with this forward."""
    members: dict[str, Any] = {"forward": forward}
    if checkpointed is not None:
        run_again = partial(partial, checkpointed, index)
        under = vars(stock).get(_CHECKPOINT)  # another's, who runs the block as well

        def checkpoint(layer: nn.Module) -> Any:
            own = vars(layer)
            if not under and _CHECKPOINT not in own:
                raise AttributeError(_CHECKPOINT)
            return run_again(under.__get__(layer) if under else own[_CHECKPOINT])

        def enable(layer: nn.Module, function: Any) -> None:
            vars(layer)[_CHECKPOINT] = function

        members[_CHECKPOINT] = property(checkpoint, enable)
    return _subclass(stock, members)


def _subclass(stock: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass of ``stock`` that looks like it. Copies and pickles of its modules are stock."""
    plain = getattr(stock, _STOCK, stock)

    def reduce(module: nn.Module, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(module, protocol)
        return object.__new__, (plain,), *reduced[2:]

    looks = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    ours = {"__reduce_ex__": reduce, _STOCK: plain, _GONE: False}
    return type(stock.__name__, (stock,), looks | ours | members)


def _leave(layer: Any, patched: Any) -> None:
    """Take ``patched`` away from a block, unless others who came later still run it."""
    setattr(patched, _GONE, True)
    while vars(type(layer)).get(_GONE):
        layer.__class__ = type(layer).__base__


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
