"""Rotary tables that depend on how long a text is: which lengths may share a forward or a cache.

transformers chooses the tables of a forward by its longest sequence. ``longrope`` has two, one up
to ``original_max_position_embeddings`` tokens and one beyond. ``dynamic`` has one up to the model's
``max_position_embeddings``, and beyond one for each length, of which a model keeps the longest that
it has seen. The other types that transformers has for texts have one; any further type is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import causal_lm

_ONE = ("default", "linear", "yarn", "llama3", "proportional")
"""Types with one table."""


def tables(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """Names of the tables that a text of ``tokens`` tokens is read by, one a kind of attention.

    Texts of equal names may be read together, and keys may be cached for a text while its names
    stay. A name never becomes smaller as a text grows. Raises UserError for a type of rotary
    embedding that is not known.
    """
    return tuple(_table(model, one, tokens) for one in _parameters(model))


def one_table(model: nn.Module, shortest: int, longest: int) -> bool:
    """Whether texts of all lengths from ``shortest`` to ``longest`` are read by the same tables."""
    return tables(model, shortest) == tables(model, longest)


def steady(model: nn.Module) -> bool:
    """Whether texts of all lengths are read by the same tables."""
    return all(one.get("rope_type", "default") in _ONE for one in _parameters(model))


def forget(model: nn.Module) -> None:
    """Bring tables that have grown with what ``model`` has read back to those of a short text."""
    if not any(_grows(one) for one in _parameters(model)):
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        # A forward over one token is what makes a rotary module give up what it has kept.
        first = torch.zeros(1, 1, dtype=torch.long, device=next(module.buffers()).device)
        for given in [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]:
            module(first.float(), first, **given)


def _parameters(model: nn.Module) -> list[Mapping[str, Any]]:
    """What the configuration says of each kind of attention's rotary embedding."""
    given = getattr(causal_lm(model).config, "rope_parameters", None) or {}
    return [one for one in given.values() if isinstance(one, dict)] or [given]


def _table(model: nn.Module, parameters: Mapping[str, Any], tokens: int) -> int:
    if _grows(parameters):
        return tokens if tokens > causal_lm(model).config.max_position_embeddings else 0
    kind = parameters.get("rope_type", "default")
    if kind == "longrope":
        return int(tokens > parameters["original_max_position_embeddings"])
    if kind not in _ONE:
        raise UserError(
            f"rotary embeddings of the type {kind!r} are not known here: what their tables depend "
            "on is not known either"
        )
    return 0


def _grows(parameters: Mapping[str, Any]) -> bool:
    # transformers takes every type with this word in its name for one that grows.
    return "dynamic" in parameters.get("rope_type", "default")
