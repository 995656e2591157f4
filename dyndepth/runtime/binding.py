"""A method that was loaded from a folder belongs to the model that it was fitted on."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import causal_lm
from dyndepth.models.fingerprints import fingerprint, original


@dataclass
class Bound:
    """Which model a loaded method belongs to.

    Attributes:
        fingerprint: of that model.
        source: where the method was loaded from, for messages.
        on_device: names of its tensors that lie where the model does.
    """

    fingerprint: str
    source: str
    on_device: tuple[str, ...] = ()
    _seen: Any = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies look for themselves which model they are attached to."""
        return Bound, (self.fingerprint, self.source, self.on_device)


def bind(model: nn.Module, method: DynamicDepthMethod) -> None:
    """Bring the tensors of a loaded method to ``model``; nothing is done to any other method.

    The model is looked at when it is first attached to: that reads all its weights. Merged recovery
    adapters do not make it another one. Raises UserError for another model than the method's.
    """
    bound = method.bound
    if not isinstance(bound, Bound):
        return
    inside = causal_lm(model)
    if bound._seen is None or bound._seen() is not inside:
        here = original(inside) or fingerprint(inside)
        if here != bound.fingerprint:
            raise UserError(
                f"the method {method.name} in {bound.source!r} was fitted on another model "
                f"({bound.fingerprint}, not {here}); give that model, or load the method by its "
                "name and fit it on this one"
            )
        bound._seen = weakref.ref(inside)
    device = next(model.parameters()).device
    for name in bound.on_device:
        if name in method.tensors:
            method.tensors[name] = method.tensors[name].to(device)
