"""A stand-in for CUDA's graphs on any device: it records operators and repeats them in place.

It refuses what a capture refuses: reads of values by the host, shapes that follow from values, and
tensors of a recording that are left for others to use without being said to be.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
"""Of the host, or whose results have a shape that follows from values."""


class Refused(RuntimeError):
    """What a capture fails with."""


class Tape(TorchDispatchMode):
    """Takes down operators with their tensors. Nothing is computed for good: what is written to
    memory from before is undone at the end, as if it had not run."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = []
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in _READS or torch.Tag.dynamic_output_shape in func.tags:
            raise Refused(f"{name}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep((given | kwargs)[argument.name])
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.made += [weakref.ref(each) for each in outs if isinstance(each, torch.Tensor)]
        self.calls.append((func, _held(args), _held(kwargs), _held(out)))
        return out

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self):
        for storage, values in self.before.values():
            storage.copy_(values)


def _held(value):
    """As it is, with tensors that nobody else holds: the recording's memory, not its objects."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_held, value))
    if isinstance(value, dict):
        return {key: _held(each) for key, each in value.items()}
    return value


class StandIn:
    """A ``Recorder``; ``recorded`` and ``repeated`` count."""

    def __init__(self):
        self.recorded = self.repeated = 0
        self._tape = None

    @contextmanager
    def session(self):
        gc.disable()
        try:
            yield
        finally:
            if self._tape is not None:
                self._tape.__exit__(None, None, None)
                self._tape = None
            gc.enable()

    def begin(self):
        assert self._tape is None
        self._tape = Tape()
        self._tape.__enter__()

    def aside(self):
        return nullcontext()

    def abandon(self):
        if self._tape is not None:
            self._tape.__exit__(None, None, None)
            self._tape.undo()
            self._tape = None

    def end(self):
        tape, self._tape = self._tape, None
        tape.__exit__(None, None, None)
        tape.undo()
        self.recorded += 1

        def repeat():
            self.repeated += 1
            with torch.no_grad():
                for func, args, kwargs, out in tape.calls:
                    _into(out, func(*args, **kwargs))

        return repeat


def _into(old, new):
    """Values of an operator that ran again, where those of the first time lie."""
    if isinstance(old, torch.Tensor):
        if old.shape != new.shape:
            raise Refused("a shape has changed")
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)
    elif isinstance(old, (tuple, list)):
        for one, other in zip(old, new, strict=True):
            _into(one, other)
