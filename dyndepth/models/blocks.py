"""One decoder block as two residual branches, whatever its architecture, and the other
parts of a model by their roles; what is peculiar to one stands in ``families``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dyndepth.common.errors import UserError
from dyndepth.method import ATTENTION, MLP
from dyndepth.models.caches import cache_argument
from dyndepth.models.families import family
from dyndepth.models.projections import Fused, Separate, linear_flops, rotate
from dyndepth.models.watching import watched

if TYPE_CHECKING:
    from dyndepth.models.families import Family
    from dyndepth.models.key_columns import Columns
    from dyndepth.models.selection import Selection


@dataclass(frozen=True)
class Ahead:
    """What an attention does for all tokens: the normed stream ``[batch, tokens, hidden]``, keys
    and values ``[batch, heads, past + tokens, head size]``, and the queries of all tokens where
    they are made along."""

    normed: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor | None


class Block:
    """One decoder block seen as two branches. Holds references, owns no parameters.

    Attributes:
        index: its number in the cache.
        parallel: both branches read the block's input.
        bias_argument: keyword of a bias of its scores, ``[batch x heads, 1, keys]``, or None.
        returns_tuple: its forward returns a tuple that leads with the stream.
        attention_modules, mlp_modules: all modules of each sublayer, norms included.
    """

    def __init__(self, layer: nn.Module, record: Family, config: Any) -> None:
        def part(name: str | None) -> Any:
            return nn.Identity() if name is None else getattr(layer, name)

        self.layer, self._record, self._config = layer, record, config
        self.attention: Any = getattr(layer, record.attention)
        self._attention_norm = part(record.attention_norm)
        self._attention_post = [part(name) for name in record.attention_post]
        self._mlp = [part(name) for name in record.mlp]
        self._mlp_norm = part(record.mlp_norm)
        self._mlp_post = [part(name) for name in record.mlp_post]
        self._multiplier = getattr(layer, record.multiplier) if record.multiplier else None
        self.parallel: bool = getattr(layer, record.parallel) if record.parallel else False
        self.returns_tuple = record.returns_tuple
        self.bias_argument = record.bias
        self.cache_argument = cache_argument(layer)
        self.index: int = self.attention.layer_idx
        self.attention_modules = [self._attention_norm, self.attention, *self._attention_post]
        self.mlp_modules = [self._mlp_norm, *self._mlp, *self._mlp_post]

        self._size: int = getattr(self.attention, record.head_size)
        self._output = getattr(self.attention, record.output)
        named = [getattr(self.attention, name) for name in (record.query, record.key, record.value)]
        self._project: Separate | Fused
        if record.fused is None:
            self._project = Separate(*named)
        else:
            heads = config.num_attention_heads
            self._project = Fused(named[0], record.fused, heads, self._size)
        norms = (record.query_norm, record.key_norm)
        self._norms = [getattr(self.attention, name) if name else None for name in norms]
        rotary = record.rotary
        self._rotary = getattr(self.attention, rotary) if isinstance(rotary, str) else rotary

    def gathers(self, sublayer: int) -> bool:
        """Whether ``sublayer`` can run for selected tokens alone.

        Not where others have put hooks on its modules, which then see all tokens as always; an
        attention only under a kernel that takes explicit masks, and if nothing in it is dropped.
        """
        if sublayer != ATTENTION:
            return not any(map(watched, self.mlp_modules))
        return (
            self._config._attn_implementation in ("sdpa", "eager")
            and not any(map(watched, self.attention_modules))
            and not (self.attention.training and self._drops)
        )

    @property
    def _drops(self) -> bool:
        """Whether its configuration names a dropout of any kind."""
        return any("drop" in name and value for name, value in vars(self._config).items())

    @property
    def window(self) -> int | None:
        """Tokens that its attention reaches back, itself included; None: all."""
        if hasattr(self.attention, "sliding_window"):
            return self.attention.sliding_window
        return getattr(self._config, "sliding_window", None)

    # --- costs ----------------------------------------------------------------------------------

    @property
    def query_flops(self) -> int:
        """FLOPs a token of what only executed tokens need: query and output projections."""
        return self._project.flops[0] + linear_flops([self._output])

    @property
    def key_value_flops(self) -> int:
        """FLOPs a token of its key and value."""
        return self._project.flops[1]

    @property
    def score_flops(self) -> int:
        """FLOPs a token and key of scores and their values."""
        return 2 * 2 * self._config.num_attention_heads * self._size

    @property
    def mlp_flops(self) -> int:
        """FLOPs a token of the MLP."""
        return linear_flops(self._mlp)

    # --- all tokens -----------------------------------------------------------------------------

    def attention_branch(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The attention branch for all tokens, by the stock module: ``[batch, tokens, hidden]``."""
        if self._record.adds_residual:
            arguments = arguments | {"residual": hidden.new_zeros(1)}
        normed = self._attention_norm(hidden)
        return self._after(
            self.attention(hidden_states=normed, **arguments)[0], self._attention_post
        )

    def mlp_branch(self, hidden: Tensor) -> Tensor:
        """The MLP branch of whatever tokens are given: ``[..., hidden] -> [..., hidden]``."""
        states = self._mlp_norm(hidden)
        if self._record.adds_residual:
            states = self._mlp[0](states, hidden.new_zeros(1))
        else:
            for module in self._mlp:
                states = module(states)
        return self._after(states, self._mlp_post)

    def states(self, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The stream after each sublayer, both for all tokens."""
        between = hidden + self.attention_branch(hidden, arguments)
        return between, between + self.mlp_branch(hidden if self.parallel else between)

    def keep(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Put keys and values of all tokens into the cache, nothing else."""
        self.ahead(hidden, arguments)

    def _after(self, branch: Tensor, post: Sequence[Any]) -> Tensor:
        for module in post:
            branch = module(branch)
        return branch if self._multiplier is None else branch * self._multiplier

    # --- selected tokens ------------------------------------------------------------------------

    def ahead(self, hidden: Tensor, arguments: dict[str, Any]) -> Ahead:
        """What an attention does for all tokens, whoever executes it; fills the cache."""
        normed = self._attention_norm(hidden)
        keys, values, queries = self._project.keys_values(normed)
        return Ahead(normed, *self._merged(keys, values, arguments), queries)

    @property
    def lays(self) -> bool:
        """Whether ``attention_laid`` can stand for its attention: where the stock one calls torch's
        fused kernel, with nothing added to its scores."""
        return (
            self._config._attn_implementation == "sdpa"
            and self.bias_argument is None
            and self.gathers(ATTENTION)
        )

    def attention_laid(
        self, ahead: Ahead, selection: Selection | None, arguments: dict[str, Any]
    ) -> Tensor:
        """The attention branch of the selected tokens, ``[count, hidden]``; None: of all tokens,
        ``[batch x tokens, hidden]``.

        Their queries lie among zeros, so that the kernel is the one that the stock attention calls,
        causal and without a mask where nothing is padded, and sees no shape of its own. The scores
        of all are computed; every projection is of the selected.
        """
        batch, tokens = ahead.normed.shape[:2]
        index = None if selection is None else selection.index
        queries = self._heads(self._project.queries(ahead.normed, index, ahead.queries), 0)
        if selection is None:
            queries = queries.unflatten(0, (batch, tokens))
        else:
            queries = selection.laid(queries)
        queries = queries.transpose(1, 2)
        if self._rotary:
            cosine, sine = arguments["position_embeddings"]
            queries = rotate(queries, cosine[:, None], sine[:, None])
        mask, keys, values = arguments.get("attention_mask"), ahead.keys, ahead.values
        if mask is not None:
            mask = mask[..., : keys.shape[2]]
        shape, groups = queries.shape, queries.shape[1] // keys.shape[1]
        grouped = groups > 1
        if grouped and tokens == 1:
            # Heads that share their keys are queries of one head: nothing need be repeated.
            queries, grouped = queries.reshape(batch, keys.shape[1], groups, -1), False
        elif grouped and mask is not None:
            keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
        out = _attention(
            queries,
            keys,
            values,
            steady=mask is None,
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            scale=getattr(self.attention, self._record.scale),
            enable_gqa=grouped and mask is None,
        )
        rows = out.reshape(shape).transpose(1, 2).flatten(2).flatten(0, 1)
        if index is not None:
            rows = rows.index_select(0, index)
        return self._after(self._output(rows), self._attention_post)

    def attention_selected(
        self, hidden: Tensor, selection: Selection, arguments: dict[str, Any]
    ) -> Tensor:
        """The attention branch of the selected tokens over all keys: ``[count, hidden]``.

        Keys and values of all tokens are computed, and put into the cache where there is one.
        """
        ahead = self.ahead(hidden, arguments)
        keys, values = ahead.keys, ahead.values
        rows = self._project.queries(ahead.normed, selection.index, ahead.queries)
        queries = self._heads(rows, 0)
        if self._rotary:
            tables = (
                selection.gather(table)[:, None] for table in arguments["position_embeddings"]
            )
            queries = rotate(queries, *tables)
        mask = selection.mask_rows(arguments.get("attention_mask"), keys)
        if self.bias_argument is not None:
            bias = arguments[self.bias_argument].view(keys.shape[0], -1, 1, keys.shape[2])
            mask = mask + bias.to(mask.dtype)
        slots = selection.into_slots(queries).transpose(1, 2)
        parts = [(slice(None), keys.shape[2])]
        if arguments.get("attention_mask") is None and self._config._attn_implementation == "sdpa":
            parts = selection.parts(keys.shape[2])
        outs = [
            self._attend(
                slots[:, :, part], keys[:, :, :end], values[:, :, :end], mask[:, :, part, :end]
            )
            for part, end in parts
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        update = self._output(selection.out_of_slots(out.flatten(2)))
        return self._after(update, self._attention_post)

    def attention_among(
        self, hidden: Tensor, selection: Selection, columns: Columns, arguments: dict[str, Any]
    ) -> Tensor:
        """The attention branch of the selected tokens among themselves and what the cache holds:
        ``[count, hidden]``. Nothing is computed of the others, or kept.

        ``columns`` says whose keys there are, those of the selected tokens by slot.
        """
        rows = hidden.flatten(0, 1).index_select(0, selection.index)
        normed = self._attention_norm(rows)[None]
        keys, values, made = self._project.keys_values(normed)
        queries = self._heads(self._project.queries(normed, None, made), 0)
        keys, values = self._heads(keys[0], 1), values[0].unflatten(-1, (-1, self._size))
        if self._rotary:
            tables = [
                selection.gather(table)[:, None] for table in arguments["position_embeddings"]
            ]
            queries, keys = rotate(queries, *tables), rotate(keys, *tables)
        queries, keys, values = (
            selection.into_slots(each).transpose(1, 2) for each in (queries, keys, values)
        )
        cache, mask = arguments.get(self.cache_argument), None
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        if not (columns.plain and self._config._attn_implementation == "sdpa"):
            bias = arguments[self.bias_argument] if self.bias_argument else None
            mask = columns.among(selection, arguments.get("attention_mask"), bias, keys.dtype)
        out = self._attend(queries, keys, values, mask)
        return self._after(
            self._output(selection.out_of_slots(out.flatten(2))), self._attention_post
        )

    def _heads(self, states: Tensor, which: int) -> Tensor:
        """``[..., size]`` to ``[..., heads, head size]``, normed; ``which``: 0 query, 1 key."""
        norm = self._norms[which]
        if norm is not None and self._record.norm_whole:
            return norm(states).unflatten(-1, (-1, self._size))
        states = states.unflatten(-1, (-1, self._size))
        return states if norm is None else norm(states)

    def _merged(
        self, keys: Tensor, values: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, past + tokens, head size]``, rotated, with the past."""
        keys = self._heads(keys, 1).transpose(1, 2)
        values = values.unflatten(-1, (-1, self._size)).transpose(1, 2)
        if self._rotary:
            cosine, sine = arguments["position_embeddings"]
            keys = rotate(keys, cosine[:, None], sine[:, None])
        cache = arguments.get(self.cache_argument)
        return (keys, values) if cache is None else cache.update(keys, values, self.index)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """``[batch, slots, heads, head size]`` of gathered queries.

        ``queries`` is ``[batch, heads, slots, head size]``, ``mask`` additive ``[batch or 1, heads
        or 1, slots, keys]``; None, under ``sdpa``: causal.
        """
        scale = getattr(self.attention, self._record.scale)
        if self._config._attn_implementation == "sdpa":
            groups = queries.shape[1] // keys.shape[1]
            if groups > 1 and mask is not None and queries.device.type != "cpu":
                # With a mask, kernels other than the slow one take no grouped heads there.
                keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
                groups = 1
            how: dict[str, Any] = {"scale": scale, "enable_gqa": groups > 1, "steady": False}
            how["is_causal"] = mask is None and queries.shape[2] > 1
            return _attention(queries, keys, values, attn_mask=mask, **how).transpose(1, 2)
        eager = getattr(
            sys.modules[type(self.attention).__module__], "eager_attention_forward", None
        )
        if eager is None:
            scores = (queries @ keys.transpose(2, 3)) * scale + mask
            return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).transpose(
                1, 2
            )
        cap = self._record.softcap
        extra = {"softcap": getattr(self.attention, cap)} if cap else {}
        return eager(
            self.attention, queries, keys, values, mask, dropout=0.0, scaling=scale, **extra
        )[0]


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, steady: bool, **how: Any
) -> Tensor:
    """torch's attention; on a GPU, unless shapes are ``steady``, without the kernel that is
    compiled anew for each: such as the length of a cache would have it compile all the time."""
    if steady or queries.device.type != "cuda":
        return scaled_dot_product_attention(queries, keys, values, **how)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return scaled_dot_product_attention(queries, keys, values, **how)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def causal_lm(model: Any) -> Any:
    """The causal LM inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True, eq=False)
class Decoder:
    """The parts of a model by their roles, as they were when it was made.

    Holds references, owns no parameters. Modules of a model may be replaced: where that can have
    happened since, another is made.

    Attributes:
        model: the causal LM, out of a peft wrapper.
        record: what is peculiar to its architecture.
        owner: the module that owns the list of blocks and sees the cache at the start of each
            forward.
        layers: the modules of the blocks, in order.
        norm: stands between the last block and the LM head.
        head: the LM head.
    """

    model: Any
    record: Family
    owner: Any
    layers: tuple[nn.Module, ...]
    norm: Any
    head: Any

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """The parts of ``model``. Raises UserError for an architecture that can't be split."""
        inside = causal_lm(model)
        record = family(inside)
        owner = inside.get_submodule(record.decoder)
        held: Any = getattr(owner, record.layers)
        return cls(
            model=inside,
            record=record,
            owner=owner,
            layers=tuple(islice(held, inside.config.num_hidden_layers)),
            norm=getattr(owner, record.final_norm),
            head=inside.get_output_embeddings(),
        )

    @property
    def config(self) -> Any:
        """The causal LM's."""
        return self.model.config

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks, and size of the stream between them."""
        return len(self.layers), int(self.config.hidden_size)

    @functools.cached_property
    def blocks(self) -> Sequence[Block]:
        """``layers``, each split into its branches when this is first asked for."""
        return tuple(Block(layer, self.record, self.config) for layer in self.layers)

    @property
    def readout(self) -> Callable[[Tensor], Tensor]:
        """Logits of final hidden states: the LM head, and what the causal LM does to its output.

        They lie on the states' device, wherever the head does.
        """
        record, config, head = self.record, self.config, self.head
        divisor = getattr(config, record.logit_divisor) if record.logit_divisor else None
        cap = getattr(config, record.logit_softcap) if record.logit_softcap else None

        def logits(hidden: Tensor) -> Tensor:
            found = head(hidden).to(hidden.device)
            if divisor is not None:
                found = found / divisor
            return found if cap is None else torch.tanh(found / cap) * cap

        return logits

    def position_bias(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Argument of every block by which scores depend on the keys' positions; none where rotary
        or learned embeddings do that.

        ``positions`` is int64 ``[batch, keys]``. A decoder that biases scores counts positions from
        its attention mask, and so has no way to be told others.
        """
        if self.record.bias is None:
            return {}
        every = torch.ones(1, int(positions.max()) + 1, dtype=torch.long, device=positions.device)
        heads = self.config.num_attention_heads
        slopes = self.owner.build_alibi_tensor(every, heads, dtype)[:, 0]  # [heads, position]
        return {self.record.bias: slopes[:, positions].transpose(0, 1).flatten(0, 1)[:, None]}


def decoder(model: nn.Module) -> Any:
    """``Decoder.owner`` alone, for what is called at every forward."""
    owner = causal_lm(model)
    return owner.get_submodule(family(owner).decoder)


def blocks(model: nn.Module) -> Sequence[Block]:
    """``Decoder.blocks`` alone."""
    return Decoder.of(model).blocks


ROLES = {
    **dict.fromkeys(("query", "key", "value", "output"), ATTENTION),
    **dict.fromkeys(("gate", "up", "down"), MLP),
}
"""The linear maps of a block by their roles, and the sublayer that each is of."""


def projections(model: nn.Module, roles: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Name in the causal LM -> module, for each of ``roles`` in each block; None: all it has.

    Roles are those of ``ROLES``; one module may have several. Raises UserError if a block has no
    such module.
    """
    parts = Decoder.of(model)
    record, found = parts.record, {}
    if roles is None:
        roles = [role for role in ROLES if getattr(record, role) is not None]
    for index, role in product(range(len(parts.layers)), tuple(roles)):
        path = getattr(record, role)
        if ROLES[role] == ATTENTION:
            path = f"{record.attention}.{path}"
        name = f"{record.decoder}.{record.layers}.{index}.{path}"
        try:
            if path is None:
                raise AttributeError
            found[name] = parts.model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"block {index} has no {role} projection{f' ({path})' if path else ''}, "
                "so no adapter can sit there; name other targets"
            ) from None
    return found
