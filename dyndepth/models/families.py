"""How each model family's decoder block splits into its two residual branches, as data.

Everything that is peculiar to an architecture stands in one record of ``FAMILIES``. A block is
``h + attention(h)`` followed by ``h + mlp(h)``, with ``branch(h) = multiplier * post(module(norm(
h)))``; what the runtime does with the two branches is common to all families. How to add one:
docs/families.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyndepth.common.errors import UserError
from dyndepth.models.projections import Layout


@dataclass(frozen=True)
class Family:
    """Names of the parts of one architecture; the defaults are those of most pre-norm decoders.

    Attributes:
        decoder: path of the module that owns the blocks, from the causal LM.
        layers, final_norm: names in it.
        attention, attention_norm, mlp_norm: names in a block; a norm is None where the branch reads
            the stream as it is.
        mlp: modules of a block that are applied one after the other.
        attention_post, mlp_post: modules applied to a branch's output.
        query, key, value, output: names in the attention. Where ``fused`` says how one map holds
            all three, the first three are that map.
        gate, up, down: paths in a block of the MLP's linear maps: the first, one beside it (None
            where there is none, or where it is part of the first), and the last.
        query_norm, key_norm: names in the attention; applied to each head, unless
            ``norm_whole``.
        rotary: whether positions are rotary; a name: the attribute of the attention that says so.
        head_size, scale: attributes of the attention.
        softcap: attribute of the attention that caps its scores, where the eager kernel takes it.
        bias: keyword under which a block gets a bias of scores by position, ``[batch x heads, 1,
            keys]``.
        multiplier: attribute of a block that both branches are multiplied by.
        parallel: attribute of a block: whether both branches read the block's input.
        adds_residual: the modules add a residual that they are given themselves.
        returns_tuple: a block returns a tuple that leads with the stream.
        logit_divisor, logit_softcap: attributes of the config that change the LM head's output.
        requires: (attribute of the config, value, what is the matter with any other).
        per_layer: settings of the config that are lists with an entry a block.
        first_layers: settings of the config that say how many blocks, from the first on, are of a
            kind.
        indexed: (attribute of the config, value, what is the matter with any other where a block
            gets another index).
    """

    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("mlp",)
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post: tuple[str, ...] = ()
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: Layout | None = None
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    norm_whole: bool = False
    rotary: bool | str = True
    head_size: str = "head_dim"
    scale: str = "scaling"
    softcap: str | None = None
    bias: str | None = None
    multiplier: str | None = None
    parallel: str | None = None
    adds_residual: bool = False
    returns_tuple: bool = False
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    requires: tuple[tuple[str, Any, str], ...] = ()
    per_layer: tuple[str, ...] = ("layer_types",)
    first_layers: tuple[str, ...] = ("max_window_layers",)
    indexed: tuple[tuple[str, Any, str], ...] = ()


def _fused(name: str) -> dict[str, Any]:
    return dict.fromkeys(("query", "key", "value"), name)


_RESIDUAL_NORM = "its norm sits on the residual stream, so a skipped sublayer is no identity"
_SANDWICH: dict[str, Any] = {
    "attention_post": ("post_attention_layernorm",),
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post": ("post_feedforward_layernorm",),
    "logit_softcap": "final_logit_softcapping",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(query_norm="q_norm", key_norm="k_norm"),
    "smollm3": Family(rotary="use_rope", per_layer=("layer_types", "no_rope_layers")),
    "granite": Family(multiplier="residual_multiplier", logit_divisor="logits_scaling"),
    "gemma2": Family(softcap="attn_logit_softcapping", **_SANDWICH),
    "gemma3_text": Family(
        query_norm="q_norm",
        key_norm="k_norm",
        requires=(("use_bidirectional_attention", False, "its attention is not causal"),),
        **_SANDWICH,
    ),
    "phi3": Family(
        attention_post=("resid_attn_dropout",),
        mlp_post=("resid_mlp_dropout",),
        **_fused("qkv_proj"),
        fused="blocks",
        gate="mlp.gate_up_proj",
        up=None,
    ),
    "olmo2": Family(
        attention_norm=None,
        attention_post=("post_attention_layernorm",),
        mlp_norm=None,
        mlp_post=("post_feedforward_layernorm",),
        query_norm="q_norm",
        key_norm="k_norm",
        norm_whole=True,
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        final_norm="final_layer_norm",
        attention="attention",
        attention_post=("post_attention_dropout",),
        mlp_post=("post_mlp_dropout",),
        **_fused("query_key_value"),
        fused="heads",
        output="dense",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        head_size="head_size",
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        final_norm="ln_f",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        **_fused("c_attn"),
        fused="blocks",
        output="c_proj",
        gate="mlp.c_fc",
        up=None,
        down="mlp.c_proj",
        rotary=False,
        requires=(("add_cross_attention", False, "its blocks have a third branch"),),
        indexed=(
            (
                "scale_attn_by_inverse_layer_idx",
                False,
                "each attention divides its scores by its place among the blocks",
            ),
        ),
    ),
    "opt": Family(
        decoder="model.decoder",
        final_norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp=("fc1", "activation_fn", "fc2"),
        mlp_norm="final_layer_norm",
        output="out_proj",
        gate="fc1",
        up=None,
        down="fc2",
        rotary=False,
        requires=(
            ("do_layer_norm_before", True, _RESIDUAL_NORM),
            ("_remove_final_layer_norm", False, "it has no final norm"),
        ),
    ),
    "bloom": Family(
        decoder="transformer",
        layers="h",
        final_norm="ln_f",
        attention="self_attention",
        **_fused("query_key_value"),
        fused="heads",
        output="dense",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        rotary=False,
        scale="inv_norm_factor",
        bias="alibi",
        adds_residual=True,
        returns_tuple=True,
        requires=(("apply_residual_connection_post_layernorm", False, _RESIDUAL_NORM),),
    ),
}


def supported() -> list[str]:
    """Model types (``config.model_type``) whose blocks the runtime can split."""
    return sorted(FAMILIES)


def family(model_or_config: Any) -> Family:
    """The record of a model's architecture; UserError for one that can't be split."""
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", type(model_or_config).__name__)
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture {model_type!r} is not supported; supported are: "
            f"{', '.join(supported())}; docs/families.md says how to add one"
        )
    record = FAMILIES[model_type]
    for name, value, matter in record.requires:
        found = getattr(config, name, value)
        if found != value:
            raise UserError(f"this {model_type} is not supported ({name}={found}): {matter}")
    return record
