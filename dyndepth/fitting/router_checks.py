"""What methods with trained routers refuse alike: numbers, and models that routers are not of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyndepth.common.errors import UserError


def check_numbers(method: Any, least: Mapping[str, int], positive: Sequence[str]) -> None:
    """Raises ValueError for a field of ``method`` below its ``least``, or not ``positive``; one
    that is None says nothing."""
    for name, bound in least.items():
        value = getattr(method, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, not {value}")
    for name in positive:
        value = getattr(method, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


def check_depth(method: Any, found: int | None, layers: int, what: str = "routers") -> None:
    """Raises UserError where ``method`` has no routers, or ``found`` blocks' and not ``layers``."""
    if found is None:
        raise UserError(
            f"{method.name} has no {what} yet; call fit(model, corpus) before attaching"
        )
    if found != layers:
        raise UserError(
            f"these {what} are for a model of {found} blocks, not {layers}; fit the method on this "
            "model"
        )


def check_width(found: int, hidden: int) -> None:
    """Raises UserError for routers of ``found`` dimensions before a stream of ``hidden``."""
    if found != hidden:
        raise UserError(
            f"these routers are for streams of {found} dimensions, not {hidden}; fit the method on "
            "this model"
        )
