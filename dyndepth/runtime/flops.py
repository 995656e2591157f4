"""The FLOP ledger: exact counts of what ran, by cause.

Two FLOPs a multiply-add, in matrix products only, as ``torch.utils.flop_counter`` counts them: the
scores and values of a token cost all keys of its sequence that are present at the end of its
forward (a causal prefill is a full square, and a window is not taken off, whatever a kernel leaves
out); under the policy ``evict``, all that are visible there. Rotary tables, norms and activations
are not counted. Counts are *useful* work: arithmetic spent on padding, on filling a rectangle in a
batch, or on a bound's foresight is kept apart under ``padding`` and is in
no total. What a backward pass computes is not counted, nor what it computes
again (gradient checkpointing); a forward that did not complete is left out whole. Documents that
begin alike may share the forward of that beginning; each is billed it in full, with the keys of its
whole context, as if it had been read at once, and what was so billed and not computed is
``reused``, a negative number. Useful + padding + reused is what the counter sees. What drafts cost,
and all that a verification costs more than its tokens would one by one, is of the cause ``draft``:
all else is then what the whole model would have cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dyndepth.method import ATTENTION, MLP
from dyndepth.models.blocks import Decoder
from dyndepth.models.projections import linear_flops

if TYPE_CHECKING:
    from dyndepth.method import Phase
    from dyndepth.models.selection import Selection


CAUSES = ("attention", "mlp", "kv_projection", "router", "readout", "lm_head", "draft")
_DENSE = ("tokens", "dense_block", "dense_total")
_COLUMNS = CAUSES + _DENSE
_COLUMN = {name: column for column, name in enumerate(_COLUMNS)}
_FLUSH_AFTER = 128


@dataclass(frozen=True)
class BlockCosts:
    """FLOPs of one token, by block: int64 ``[layers]``; ``score`` is per token and key."""

    projections: np.ndarray
    score: np.ndarray
    key_value: np.ndarray
    mlp: np.ndarray
    lm_head: int

    @classmethod
    def of(cls, model: nn.Module) -> BlockCosts:
        """Costs read off the modules of a supported model."""
        return cls.of_parts(Decoder.of(model))

    @classmethod
    def of_parts(cls, parts: Decoder) -> BlockCosts:
        """``of``, for a model whose parts are known."""
        split = parts.blocks
        projections = [block.query_flops + block.key_value_flops for block in split]
        return cls(
            projections=np.array(projections, dtype=np.int64),
            score=np.array([block.score_flops for block in split], dtype=np.int64),
            key_value=np.array([block.key_value_flops for block in split], dtype=np.int64),
            mlp=np.array([block.mlp_flops for block in split], dtype=np.int64),
            lm_head=linear_flops([parts.head]),
        )

    def attention(self, context: float) -> np.ndarray:
        """FLOPs a token of each attention sublayer with ``context`` keys: ``[layers]``."""
        return self.projections + self.score * context

    def block(self, context: float) -> float:
        """FLOPs a token of all blocks at full depth."""
        return float((self.attention(context) + self.mlp).sum())


@dataclass
class Bill:
    """The method's own arithmetic: ``tokens`` None means every valid token. ``rows``: how many it
    was done for in truth, where that is not their number."""

    cause: str
    flops_per_token: float
    tokens: Tensor | None
    rows: int | None = None


@dataclass
class Forward:
    """What one forward executed; the runtime fills it, the ledger reduces it later.

    ``calls`` holds, for each call of a block, the block and its two gates as executed: True, False
    or a Selection. They need not be all blocks, nor each once, nor in order. ``whole`` has the
    (call, sublayer) that ran for all tokens although their gate selects some, ``kept`` the calls
    that nobody executed and whose keys and values are cached nevertheless, ``laid`` those whose
    attention made keys and values before its gate was known, and the scores of all tokens if any
    executed it.
    ``cached`` says whether a cache was there, so that skipped tokens were projected under the
    policy ``project``. ``masked`` marks the backend that computes everything, ``foresight`` a
    forward that was looked ahead of: all blocks and a head after each, work done for nobody.
    ``shared`` has, for each row, the documents that begin with it and the length of the context
    that each reads it in; None where a row is its one document's. ``evicted`` has, for each call
    whose attention did not see all tokens, how many it saw at the end, int64 ``[batch]``, and how
    many keys it was computed with. ``attended`` is bool ``[batch, keys]``, False on padding, if
    there is any. ``draft`` is True for tokens that are drafted, to be verified by another forward;
    ``rejected`` is None but in a verification, where it is how many of the last tokens do not
    stand. All that these and drafted ones cost is of the cause ``draft``, and they are not among
    the tokens; so are, of those that stand, the scores of keys that come after them: without a
    draft each would have been read alone.
    """

    documents: Sequence[str] | None
    phase: Phase
    batch: int
    width: int
    keys: int
    valid: Tensor | None
    generation: Tensor | None
    context: Tensor | None
    project: bool
    cached: bool
    masked: bool
    calls: list[tuple[int, bool | Selection, bool | Selection]] = field(default_factory=list)
    whole: set[tuple[int, int]] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)
    laid: set[int] = field(default_factory=set)
    evicted: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    bills: list[Bill] = field(default_factory=list)
    heads: list[tuple[Tensor | int, int]] = field(default_factory=list)
    foresight: bool = False
    shared: Sequence[Sequence[tuple[str, int]]] | None = None
    attended: Tensor | None = None
    draft: bool = False
    rejected: int | None = None

    def again(self) -> Forward:
        """The same forward with nothing done yet, for what does not count."""
        nothing: dict[str, Any] = {"whole": set(), "kept": set(), "laid": set(), "evicted": {}}
        return replace(self, calls=[], bills=[], heads=[], **nothing)

    def executed(self, layers: int) -> Tensor:
        """Which tokens ran each sublayer: bool ``[batch, width, layers, 2]``, False on padding."""
        ran = torch.zeros(self.batch, self.width, layers, 2, dtype=torch.bool)
        for layer, *gates in self.calls:
            for sublayer, gate in enumerate(gates):
                ran[..., layer, sublayer] |= gate if isinstance(gate, bool) else gate.mask.cpu()
        return ran if self.valid is None else ran & self.valid.cpu()[..., None, None]


class Ledger:
    """Sums of executed work by document, phase and cause.

    The forward that completed last stays open, whatever is read: the LM head's calls, readouts and
    bills that follow it belong to it, until the next one completes.
    """

    def __init__(self, costs: BlockCosts) -> None:
        self.costs = costs
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._pending: list[Forward] = []
        self._sums = _Sums(self.costs)

    def add(self, forward: Forward) -> None:
        """Take a forward that has completed; it is reduced some time after the next."""
        if len(self._pending) >= _FLUSH_AFTER:
            self._flush()
        self._pending.append(forward)

    @property
    def last(self) -> Forward | None:
        """The forward that completed last; None before the first."""
        return self._pending[-1] if self._pending else None

    def bill_last(self, shared: Sequence[Sequence[tuple[str, int]]]) -> None:
        """Bill each row of the forward that completed last to several documents; see ``Forward``.

        Each pays what its tokens cost in one forward over its whole context. Raises RuntimeError if
        there is no forward to bill.
        """
        if self.last is None:
            raise RuntimeError("bill_last needs a forward before it")
        self.last.shared = shared

    def totals(self, phase: str | None = None) -> dict[str, Any]:
        """Sums over all forwards, or over one phase.

        Returns ``tokens``, ``block_flops`` (attention + mlp executed), ``total_flops`` (all
        causes), ``dense_block_flops``, ``dense_total_flops`` and ``by_cause``. ``padding``, what
        was computed for nobody, and ``reused``, what was billed and not computed (negative), are
        known over all phases only. Dense is every block once for each of the tokens, whichever
        blocks were called.
        """
        sums = self._flush()
        total = sum((v for (_, p), v in sums.rows.items() if phase in (None, p)), _zero())
        result = self._named(total)
        by_cause = {cause: float(total[_COLUMN[cause]]) for cause in CAUSES}
        if phase is None:
            useful = float(total[: len(CAUSES)].sum())
            by_cause["padding"] = sums.computed - sums.reused - useful
            by_cause["reused"] = sums.reused
        return result | {"by_cause": by_cause}

    def by_document(self) -> dict[str, dict[str, float]]:
        """The totals of each document, both phases together."""
        found: dict[str, np.ndarray] = {}
        for (document, _), row in self._flush().rows.items():
            found[document] = found.get(document, _zero()) + row
        return {document: self._named(row) for document, row in found.items()}

    def executed(self, phase: str | None = None) -> Tensor:
        """Fraction of valid tokens executed by each sublayer: float64 ``[layers, 2]``.

        Of the tokens of all forwards, those that did not call the block included; more than 1 for
        a block that forwards call more than once. NaN where there were no tokens.
        """
        sums = self._flush()
        phases = [p for p in sums.executed if phase in (None, p)]
        tokens = sum(sums.tokens[p] for p in phases)
        if not tokens:
            return torch.full((len(self.costs.mlp), 2), float("nan"), dtype=torch.float64)
        return torch.from_numpy(sum(sums.executed[p] for p in phases) / tokens)

    def computed_for_all(self) -> tuple[int, int]:
        """Calls of sublayers that computed all tokens although their gate was not open for all of
        them, and calls of sublayers with such a gate: ``(computed, gated)``."""
        sums = self._flush()
        return sums.whole, sums.gated

    def drafts(self) -> tuple[float, float]:
        """Block FLOPs of all drafted tokens: as they were drafted, and at full depth."""
        executed, dense = self._flush().drafts
        return float(executed), float(dense)

    @staticmethod
    def _named(row: np.ndarray) -> dict[str, Any]:
        block = row[_COLUMN["attention"]] + row[_COLUMN["mlp"]]
        return {
            "tokens": int(row[_COLUMN["tokens"]]),
            "block_flops": float(block),
            "total_flops": float(row[: len(CAUSES)].sum()),
            "dense_block_flops": float(row[_COLUMN["dense_block"]]),
            "dense_total_flops": float(row[_COLUMN["dense_total"]]),
        }

    def _flush(self) -> _Sums:
        """Reduce what is closed; returns the sums of that and of the open forward."""
        closed, self._pending = self._pending[:-1], self._pending[-1:]
        for forward in closed:
            self._sums.add(forward)
        if not self._pending:
            return self._sums
        sums = self._sums.copy()
        sums.add(self._pending[0])
        return sums


class _Sums:
    """Forwards reduced to numbers."""

    def __init__(self, costs: BlockCosts) -> None:
        self.costs = costs
        self.rows: dict[tuple[str, str], np.ndarray] = {}
        self.executed: dict[str, np.ndarray] = {}
        self.tokens: dict[str, float] = {}
        self.computed = 0.0
        self.reused = 0.0
        self.gated = self.whole = 0
        self.drafts = np.zeros(2)

    def copy(self) -> _Sums:
        """Sums that can be added to without changing these; no array is ever written to."""
        other = copy(self)
        other.rows, other.executed = dict(self.rows), dict(self.executed)
        other.tokens = dict(self.tokens)
        return other

    def add(self, forward: Forward) -> None:
        """Add one forward."""
        for phase, part, draft in _parts(forward):
            self._reduce(forward, phase, part, draft)
        self.computed += self._physical(forward)
        gates = [gate for _, *pair in forward.calls for gate in pair]
        gated = len(gates) - sum(gate is True for gate in gates)
        self.gated += gated
        self.whole += gated if forward.masked else len(forward.whole)

    def _reduce(self, forward: Forward, phase: str, part: Tensor | None, draft: bool) -> None:
        """Add the useful work of one phase's tokens; ``part`` is their mask, None for all. What is
        a ``draft`` has a cause of its own and no tokens."""
        costs, batch, calls = self.costs, forward.batch, len(forward.calls)
        layers = np.array([layer for layer, _, _ in forward.calls], dtype=np.int64)
        if part is None:
            tokens = np.full(batch, float(forward.width))
        else:
            tokens = part.sum(1).double().cpu().numpy()
        if forward.context is None:
            context = np.full(batch, float(forward.keys))
        else:
            context = forward.context.double().cpu().numpy()
        executed = self._executed_counts(forward, part, tokens)  # [batch, calls, 2]
        times = np.ones(batch)
        if forward.shared is not None:
            times = np.array([float(len(readers)) for readers in forward.shared])
        if not draft:
            counted = np.zeros((len(costs.mlp), 2))
            np.add.at(counted, layers, (executed * times[:, None, None]).sum(0))
            self.executed[phase] = self.executed.get(phase, 0.0) + counted
            self.tokens[phase] = self.tokens.get(phase, 0.0) + float(tokens @ times)
        if forward.masked:
            executed = np.broadcast_to(tokens[:, None, None], (batch, calls, 2))

        attention = costs.projections + costs.score * context[:, None]  # [batch, layers]
        rows = np.zeros((batch, len(_COLUMNS)))
        each = attention[:, layers]
        for call, (seen, _) in forward.evicted.items():
            missing = context - seen.double().cpu().numpy()
            each[:, call] -= costs.score[layers[call]] * missing
        rows[:, _COLUMN["attention"]] = (executed[:, :, 0] * each).sum(1)
        rows[:, _COLUMN["mlp"]] = executed[:, :, 1] @ costs.mlp[layers]
        if forward.project:
            projected = tokens[:, None] - executed[:, :, 0]
            if not forward.cached:
                kept = np.array([gate is not False for _, gate, _ in forward.calls], dtype=bool)
                projected = projected * kept
            rows[:, _COLUMN["kv_projection"]] = projected @ costs.key_value[layers]
        for bill in forward.bills:
            counts = tokens if bill.tokens is None else _count(bill.tokens, part)
            rows[:, _COLUMN[bill.cause]] += counts * bill.flops_per_token
        for head, _ in forward.heads:
            if isinstance(head, int):
                counts = tokens if head == forward.width else _last(forward, phase, head, batch)
            else:
                counts = head.double().cpu().numpy() * (phase == _last_phase(forward))
            rows[:, _COLUMN["lm_head"]] += counts * costs.lm_head
        dense_block = tokens * (attention + costs.mlp).sum(1)
        if draft:
            spent = rows[:, : len(CAUSES)].sum(1)
            if forward.draft is True:
                own = rows[:, _COLUMN["attention"]] + rows[:, _COLUMN["mlp"]]
                dense = tokens * (attention + costs.mlp).sum(1)
                self.drafts = self.drafts + [own.sum(), dense.sum()]
            rows[:] = 0.0
            rows[:, _COLUMN["draft"]] = spent
            tokens = dense_block = np.zeros(batch)
        elif forward.rejected is not None:
            later = _later(forward, part)
            scores = later * costs.score[layers].sum()
            rows[:, _COLUMN["attention"]] -= scores
            rows[:, _COLUMN["draft"]] += scores
            dense_block = dense_block - later * costs.score.sum()
        rows[:, _COLUMN["tokens"]] = tokens
        rows[:, _COLUMN["dense_block"]] = dense_block
        rows[:, _COLUMN["dense_total"]] = dense_block + rows[:, _COLUMN["lm_head"]]
        if forward.shared is not None:
            scores = executed[:, :, 0] @ costs.score[layers]
            self._share(forward.shared, phase, rows, scores, tokens, context)
            return
        for row in range(batch):
            document = forward.documents[row] if forward.documents else ""
            self._add_row(document, phase, rows[row])

    def _share(
        self,
        shared: Sequence[Sequence[tuple[str, int]]],
        phase: str,
        rows: np.ndarray,
        scores: np.ndarray,
        tokens: np.ndarray,
        context: np.ndarray,
    ) -> None:
        """Bill rows to the documents that share them, each with the keys of its whole context.

        ``scores`` are the FLOPs of all attentions that one key more would cost, ``[batch]``.
        """
        a_key = np.zeros(rows.shape)
        a_key[:, _COLUMN["attention"]] = scores
        a_key[:, [_COLUMN["dense_block"], _COLUMN["dense_total"]]] = (
            tokens * self.costs.score.sum()
        )[:, None]
        for row, readers in enumerate(shared):
            self.reused += rows[row, : len(CAUSES)].sum()
            for document, keys in readers:
                alone = rows[row] + (keys - context[row]) * a_key[row]
                self.reused -= alone[: len(CAUSES)].sum()
                self._add_row(document, phase, alone)

    def _add_row(self, document: str, phase: str, row: np.ndarray) -> None:
        key = (document, phase)
        self.rows[key] = self.rows.get(key, _zero()) + row

    @staticmethod
    def _executed_counts(forward: Forward, part: Tensor | None, tokens: np.ndarray) -> np.ndarray:
        """Tokens of ``part`` that each call of a sublayer executed: ``[batch, calls, 2]``."""
        gates = [gate for _, *pair in forward.calls for gate in pair]
        executed = np.zeros((forward.batch, len(gates)))
        executed[:, [g is True for g in gates]] = tokens[:, None]
        masks = [(i, g.mask) for i, g in enumerate(gates) if not isinstance(g, bool)]
        if masks:
            place = masks[0][1].device if part is None else part.device
            stack = torch.stack([mask.to(place) for _, mask in masks])
            counts = (stack if part is None else stack & part).sum(-1)
            executed[:, [i for i, _ in masks]] = counts.T.double().cpu().numpy()
        return executed.reshape(forward.batch, len(forward.calls), 2)

    def _physical(self, forward: Forward) -> float:
        """FLOPs that the forward's matrix products did, padding and rectangles included."""
        costs = self.costs
        rectangle = forward.batch * forward.width
        total = 0.0
        for call, (layer, attention, mlp) in enumerate(forward.calls):
            whole = [forward.masked or (call, sublayer) in forward.whole for sublayer in (0, 1)]
            keys = forward.evicted[call][1] if call in forward.evicted else forward.keys
            if attention is True or whole[ATTENTION]:
                total += rectangle * (costs.projections[layer] + costs.score[layer] * keys)
            elif attention is False:
                keeps = (forward.project or call in forward.kept) and forward.cached
                total += rectangle * costs.key_value[layer] * (keeps or call in forward.laid)
            else:
                projected = attention.count if call in forward.evicted else rectangle
                total += attention.count * (costs.projections[layer] - costs.key_value[layer])
                total += projected * costs.key_value[layer]
                slots = forward.width if call in forward.laid else attention.slots
                total += forward.batch * slots * keys * costs.score[layer]
            if mlp is True or whole[MLP]:
                total += rectangle * costs.mlp[layer]
            elif mlp is not False:
                total += mlp.count * costs.mlp[layer]
        for bill in forward.bills:
            count = bill.rows
            if count is None:
                count = rectangle if bill.tokens is None else int(bill.tokens.sum())
            total += count * bill.flops_per_token
        if forward.foresight:
            depths = len(costs.mlp) + 1
            total += rectangle * (costs.block(forward.keys) + depths * costs.lm_head)
        return total + sum(rows for _, rows in forward.heads) * costs.lm_head


def _zero() -> np.ndarray:
    return np.zeros(len(_COLUMNS))


def _parts(forward: Forward) -> list[tuple[str, Tensor | None, bool]]:
    """The phases that a forward holds, each with the mask of its valid tokens, and whether these
    are drafted and do not stand."""
    if forward.generation is None:
        return _standing(forward, forward.phase, forward.valid)
    prompt, generation = ~forward.generation, forward.generation
    if forward.valid is not None:
        prompt, generation = prompt & forward.valid, generation & forward.valid
    return [
        *_standing(forward, "prompt", prompt),
        *_standing(forward, "generation", generation),
    ]


def _standing(
    forward: Forward, phase: str, part: Tensor | None
) -> list[tuple[str, Tensor | None, bool]]:
    """What stands of a phase's tokens, and what does not, if there is any."""
    if not forward.rejected:
        return [(phase, part, forward.draft)]
    device = None if part is None else part.device
    stands = torch.arange(forward.width, device=device) < forward.width - forward.rejected
    stands = stands.expand(forward.batch, -1)
    if part is None:
        return [(phase, stands, False), (phase, ~stands, True)]
    return [(phase, part & stands, False), (phase, part & ~stands, True)]


def _later(forward: Forward, part: Tensor | None) -> np.ndarray:
    """Tokens of a forward that come after those of ``part``, summed over these: ``[batch]``."""
    if forward.valid is None:
        later = torch.arange(forward.width - 1, -1, -1).expand(forward.batch, -1)
    else:
        valid = forward.valid.long().cpu()
        later = valid.sum(1, keepdim=True) - valid.cumsum(1)
    counted: np.ndarray = (later if part is None else later * part.cpu()).sum(1).double().numpy()
    return counted


def _count(tokens: Tensor, part: Tensor | None) -> np.ndarray:
    tokens = tokens if part is None else tokens & part.to(tokens.device)
    return tokens.sum(1).double().cpu().numpy()


def _last_phase(forward: Forward) -> str:
    """The phase of the forward's last token."""
    return "generation" if forward.generation is not None else forward.phase


def _last(forward: Forward, phase: str, rows: int, batch: int) -> np.ndarray:
    """LM head rows of the last ``rows`` positions only: they belong to the last token's phase."""
    return np.full(batch, float(rows * (phase == _last_phase(forward))))
