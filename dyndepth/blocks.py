"""How each model family's decoder block splits into its two residual branches, as data.

Everything that is peculiar to an architecture stands in one record of ``FAMILIES``. A block is
``h + attention(h)`` followed by ``h + mlp(h)``, with ``branch(h) = module(norm(h))``; what the
runtime does with the two branches is common to all families.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dyndepth.errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of the parts of one architecture; the defaults are those of most pre-norm decoders."""

    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    gate: str = "gate_proj"
    query_norm: str | None = None
    key_norm: str | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(query_norm="q_norm", key_norm="k_norm"),
}


def supported() -> list[str]:
    """Model types (``config.model_type``) whose blocks the runtime can split."""
    return sorted(FAMILIES)


def family(model_or_config: Any) -> Family:
    """The record of a model's architecture; UserError with the list if there is none."""
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", type(model_or_config).__name__)
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture {model_type!r} is not supported; supported are: {', '.join(supported())}"
        )
    return FAMILIES[model_type]


CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Keywords under which forwards take their cache; transformers 5.24 renamed it to the first."""


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    accepted = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), CACHE_ARGUMENTS[-1])


def cache_argument(module: Any) -> str:
    """The keyword under which ``module.forward`` takes its cache."""
    return _cache_argument(type(module).forward)


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, or in its output; None if there is none."""
    for name in CACHE_ARGUMENTS:  # in an output, asking for the second is deprecated
        found = values.get(name)
        if found is not None:
            return found
    return None


def causal_lm(model: Any) -> Any:
    """The causal LM inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> Any:
    """The module that owns the list of blocks and sees the cache at the start of each forward."""
    return getattr(causal_lm(model), family(causal_lm(model)).decoder)


def blocks(model: nn.Module) -> list[Block]:
    """The model's decoder blocks, in order, each split into its branches."""
    record = family(causal_lm(model))
    layers = getattr(decoder(model), record.layers)
    return [Block(layer, record) for layer in layers[: causal_lm(model).config.num_hidden_layers]]


def final_norm(model: nn.Module) -> Any:
    """The norm between the last block and the LM head."""
    return getattr(decoder(model), family(causal_lm(model)).final_norm)


def projections(model: nn.Module, roles: Iterable[str]) -> dict[str, nn.Module]:
    """Name in the causal LM -> module, for each of ``roles`` in each block.

    Roles are the record's: ``query``, ``key``, ``value``, ``output``, ``gate`` (of the MLP).
    Raises UserError if a block has no such module.
    """
    record = family(causal_lm(model))
    roles = tuple(roles)
    found = {}
    for index in range(len(blocks(model))):
        for role in roles:
            branch = record.mlp if role == "gate" else record.attention
            path = (record.decoder, record.layers, str(index), branch, getattr(record, role))
            try:
                found[".".join(path)] = causal_lm(model).get_submodule(".".join(path))
            except AttributeError:
                raise UserError(
                    f"block {index} has no {role} projection ({'.'.join(path[3:])}), "
                    "so no adapter can sit there; name other targets"
                ) from None
    return found


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding over the last dimension, halves paired."""
    half = states.shape[-1] // 2
    rotated = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cosine + rotated * sine


class Block:
    """One decoder block seen as two branches. Holds references, owns no parameters."""

    def __init__(self, layer: nn.Module, record: Family) -> None:
        self.layer = layer
        self.attention: Any = getattr(layer, record.attention)
        self.attention_norm: nn.Module = getattr(layer, record.attention_norm)
        self.mlp: nn.Module = getattr(layer, record.mlp)
        self.mlp_norm: nn.Module = getattr(layer, record.mlp_norm)
        self.query: nn.Module = getattr(self.attention, record.query)
        self.key: nn.Module = getattr(self.attention, record.key)
        self.value: nn.Module = getattr(self.attention, record.value)
        self.output: nn.Module = getattr(self.attention, record.output)
        self.query_norm = getattr(self.attention, record.query_norm) if record.query_norm else None
        self.key_norm = getattr(self.attention, record.key_norm) if record.key_norm else None
        self.cache_argument = cache_argument(layer)
        self.index: int = self.attention.layer_idx

    def attention_branch(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The attention branch for all tokens, by the stock module: ``[batch, tokens, hidden]``."""
        return self.attention(hidden_states=self.attention_norm(hidden), **arguments)[0]

    def mlp_branch(self, hidden: Tensor) -> Tensor:
        """The MLP branch of whatever tokens are given: ``[..., hidden] -> [..., hidden]``."""
        return self.mlp(self.mlp_norm(hidden))

    def keys_values(self, normed: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of all tokens, merged with the cache where there is one.

        ``normed`` is ``[batch, tokens, hidden]``, already through the branch's norm; the result is
        two tensors ``[batch, key heads, past + tokens, head size]``.
        """
        batch, tokens, _ = normed.shape
        heads = (batch, tokens, -1, self.attention.head_dim)
        keys = self.key(normed).view(heads)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        cosine, sine = arguments["position_embeddings"]
        keys = _rotate(keys.transpose(1, 2), cosine[:, None], sine[:, None])
        values = self.value(normed).view(heads).transpose(1, 2)
        cache = arguments.get(self.cache_argument)
        if cache is not None:
            return cache.update(keys, values, self.index)
        return keys, values

    def queries(self, normed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotated queries of the selected tokens: ``[n, hidden] -> [n, heads, head size]``."""
        queries = self.query(normed).view(normed.shape[0], -1, self.attention.head_dim)
        if self.query_norm is not None:
            queries = self.query_norm(queries)
        return _rotate(queries, cosine[:, None], sine[:, None])

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of gathered queries under an explicit mask.

        ``queries`` is ``[batch, slots, heads, head size]``, ``mask`` additive ``[batch or 1, 1,
        slots, keys]``. Returns ``[batch, slots, heads x head size]``.
        """
        config = self.attention.config
        scale = self.attention.scaling
        queries = queries.transpose(1, 2)
        if config._attn_implementation == "sdpa":
            grouped = queries.shape[1] != keys.shape[1]
            out = scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
            ).transpose(1, 2)
        else:
            interface = _attention_interface(self.attention)
            out, _ = interface(
                self.attention, queries, keys, values, mask, dropout=0.0, scaling=scale
            )
        return out.flatten(2)


def _attention_interface(attention: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the stock module would call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(attention).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
