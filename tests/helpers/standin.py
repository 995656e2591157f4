"""A device that no machine has: its tensors are held, and computed with, on the CPU.

It refuses what a GPU refuses, with a GPU's words: operations on tensors of two devices, numpy, and
random numbers from another device's generator. Importing this module registers it with torch as
the device ``standin``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "standin"

_CROSSING = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Whose indices may lie on the CPU while the indexed tensor does not."""
_JOINING = {"cat", "stack"}
"""Who take no number of the CPU beside the device's tensors, as other operations do."""


class Held(Tensor):
    """A tensor of the device; ``held`` is the CPU tensor that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # where torch leaves composite operations whole
            found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return _run(func, *args, **(kwargs or {}))

    def numpy(self, *, force: bool = False) -> Any:
        """What a GPU's tensor says."""
        if force:
            return self.held.numpy(force=True)
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def tolist(self) -> Any:
        """torch refuses it to subclasses."""
        return self.held.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """That this exists makes ``Module.to`` swap parameters, so that tied ones stay tied."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Held:
        return Held(inner["held"])

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.held!r})"


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation, on the held tensors; what it returns lies where a GPU would put it."""
    given: list[Tensor] = []
    plain = [_taken(each, given) for each in args]
    named = {name: _taken(each, given) for name, each in kwargs.items()}
    known = {id(each.held): each for each in given if isinstance(each, Held)}
    _check(func, args, given)
    here = bool(known)
    if named.get("device") is not None:
        here, named["device"] = torch.device(named["device"]).type == NAME, "cpu"
    if here and (generator := kwargs.get("generator")) is not None:
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'"
        )
    return _placed(func(*plain, **named), known, here)


def _taken(value: Any, given: list[Tensor]) -> Any:
    """``value`` with held tensors in place of the device's; all tensors go into ``given``."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.held if isinstance(value, Held) else value
    if isinstance(value, (list, tuple)):
        return [_taken(each, given) for each in value]
    return value


def _placed(value: Any, known: dict[int, Held], here: bool) -> Any:
    """A result; what was written in place is the object that was given."""
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else Held(value) if here else value
    if isinstance(value, (list, tuple)):
        return tuple(_placed(each, known, here) for each in value)
    return value


def _check(func: Any, args: Any, given: list[Tensor]) -> None:
    """Refuse tensors of two devices, but for numbers of the CPU, where a GPU does."""
    if not any(not isinstance(each, Held) for each in given):
        return
    name = func._schema.name.removeprefix("aten::")
    if name in _CROSSING:
        return
    if name in _INDEXING and isinstance(args[0], Held):
        given = [args[0], *(each for each in args[2:] if isinstance(each, Tensor))]
    alone = name not in _JOINING
    counted = [each for each in given if isinstance(each, Held) or each.ndim or not alone]
    if len({each.device for each in counted}) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! (when checking arguments of {name})"
        )


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Any:
    """What copying comes down to where torch leaves subclasses out: in ``torch.tensor``."""
    return _run(torch.ops.aten.copy_.default, target, source)


class _Module(_DummyBackendModule):
    """What torch asks of ``torch.standin``: numbers are drawn on the CPU; here is kept a state."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed


_setup_privateuseone_for_python_backend(NAME, _Module())
_aten = Library("aten", "IMPL")
for _factory in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
    _aten.impl(_factory, partial(_run, _factory), "PrivateUse1")
_aten.impl("_copy_from", _copied, "PrivateUse1")
