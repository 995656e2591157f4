"""What a model loses when units are removed: each alone, and one after another.

A unit is a set of sublayers that go together: one sublayer, or a block. Loss is next-token loss on
a few windows, without what was removed. There is one greedy search. ``full`` measures every
remaining unit again after each removal, as SLEB does (arXiv 2402.09025); ``lazy`` measures a unit
again only when it comes to the top of the queue (Minoux 1978): removals mostly make each other
worse, so an old value is mostly an underestimate. Measured: two to four forwards a step where a
full search over sublayers takes sixty.

Routers begin where removal says: with the sublayers that cost least.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dyndepth.common.files import cache_root, write_atomically
from dyndepth.models.blocks import blocks, causal_lm
from dyndepth.runtime.many_plans import losses

Unit = tuple[int, ...]
"""Sublayers that are removed together, as places in a plan read row by row: 2 x layer, and one
more for the MLP."""

SearchKind = Literal["full", "lazy"]

# Windows are read in parts of about so many tokens: bounds memory, moves the progress bar.
_TOKENS_AT_ONCE = 512


def units_of(layers: int, kind: str) -> list[Unit]:
    """All units of ``kind``, ``block`` or ``sublayer``, in the order of the forward."""
    if kind == "block":
        return [(2 * layer, 2 * layer + 1) for layer in range(layers)]
    return [(place,) for place in range(2 * layers)]


def plan_without(layers: int, removed: Sequence[Unit]) -> Tensor:
    """The plan that executes everything but ``removed``: bool ``[layers, 2]``."""
    plan = torch.ones(layers, 2, dtype=torch.bool)
    plan.view(-1)[[place for unit in removed for place in unit]] = False
    return plan


@torch.no_grad()
def mean_losses(
    model: nn.Module, plans: Tensor, ids: Tensor, *, progress: bool = False, what: str = "losses"
) -> Tensor:
    """Mean next-token loss in nats under each plan: float64 ``[plans]``, infinite for NaN.

    ``plans`` is bool ``[plans, layers, 2]``, ``ids`` int64 ``[windows, length]``.
    """
    rows = max(1, _TOKENS_AT_ONCE // ids.shape[1])
    total = torch.zeros(len(plans), dtype=torch.float64)
    bar = tqdm(total=len(ids), desc=what, unit="window", disable=not progress, leave=False)
    with bar:
        for part in ids.to(next(model.parameters()).device).split(rows):
            total += losses(model, plans, part).double().cpu().sum(1)
            bar.update(len(part))
    return (total / len(ids)).nan_to_num(nan=math.inf)


def losses_alone(
    model: nn.Module, ids: Tensor, units: Sequence[Unit], *, progress: bool = True
) -> tuple[float, Tensor]:
    """Loss of the whole model, and with each unit alone removed: nats, float64 ``[units]``."""
    layers = len(blocks(model))
    plans = torch.stack([plan_without(layers, [unit] if unit else []) for unit in [(), *units]])
    found = mean_losses(model, plans, ids, progress=progress, what="each alone")
    return float(found[0]), found[1:]


def removal_damage(model: nn.Module, ids: Tensor, *, progress: bool = True) -> Tensor:
    """Loss added by removing each sublayer alone, in nats: float32 ``[layers, 2]``."""
    every = units_of(len(blocks(model)), "sublayer")
    dense, alone = losses_alone(model, ids, every, progress=progress)
    return (alone - dense).float().view(-1, 2)


@dataclass(frozen=True)
class Step:
    """One removal: which unit (its index), loss (nats) and executed share after it."""

    unit: int
    loss: float
    executed: float


@dataclass(frozen=True)
class Candidate:
    """What is known of a unit that is still there.

    ``rate`` is the loss its removal adds per share of the budget, ``after`` the loss then, both as
    measured when ``measured`` units had gone; -1: not yet.
    """

    rate: float = math.inf
    after: float = math.inf
    measured: int = -1


@dataclass
class Search:
    """A greedy search as far as it has gone: plain data, to be kept and continued."""

    dense: float
    steps: list[Step]
    candidates: dict[int, Candidate] = field(repr=False)

    @classmethod
    def over(cls, count: int) -> Search:
        """A search over ``count`` units that has not begun."""
        return cls(math.nan, [], {unit: Candidate() for unit in range(count)})

    @property
    def executed(self) -> float:
        """Share of the budget that is left."""
        return self.steps[-1].executed if self.steps else 1.0

    @property
    def loss(self) -> float:
        """Loss in nats without what was removed."""
        return self.steps[-1].loss if self.steps else self.dense

    def first(self) -> int:
        """The candidate that seems to cost least."""
        return min(self.candidates, key=lambda unit: (self.candidates[unit].rate, unit))

    def outdated(self, kind: SearchKind) -> list[int]:
        """The candidates to measure before the next one can be taken."""
        now = len(self.steps)
        if any(each.measured < 0 for each in self.candidates.values()):
            return [unit for unit, each in self.candidates.items() if each.measured < 0]
        asked = list(self.candidates) if kind == "full" else [self.first()]
        return [unit for unit in asked if self.candidates[unit].measured < now]

    def take(self, unit: int, price: float) -> None:
        """Remove ``unit``, whose share of the budget is ``price``."""
        after = self.candidates.pop(unit).after
        self.steps.append(Step(unit, after, self.executed - price))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "dense": self.dense,
            "steps": [[each.unit, each.loss, each.executed] for each in self.steps],
            "candidates": [
                [unit, each.rate, each.after, each.measured]
                for unit, each in self.candidates.items()
            ],
        }

    @classmethod
    def of_json(cls, kept: Any, count: int) -> Search:
        """What ``to_json`` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        steps = [Step(int(unit), float(a), float(b)) for unit, a, b in kept["steps"]]
        candidates = {
            int(unit): Candidate(float(a), float(b), int(at))
            for unit, a, b, at in kept["candidates"]
        }
        if sorted([each.unit for each in steps] + list(candidates)) != list(range(count)):
            raise ValueError("the search is over other units")
        return cls(float(kept["dense"]), steps, candidates)


def greedy(
    model: nn.Module,
    ids: Tensor,
    units: Sequence[Unit],
    shares: Tensor,
    until: float,
    *,
    kind: SearchKind = "full",
    begun: Search | None = None,
    keep: Callable[[Search], None] = lambda search: None,
    progress: bool = True,
) -> Search:
    """Remove ``units`` one after another until at most ``until`` is executed.

    Each step removes the unit that adds least loss per share of the budget ``shares``
    ``[layers, 2]``, given all removals before it. Something always remains. ``begun`` is continued
    in place; ``keep`` sees the search after each step.
    """
    layers = len(shares)
    prices = [float(sum(shares.view(-1)[list(unit)].tolist())) for unit in units]
    search = begun or Search.over(len(units))
    least = 1 if sum(map(len, units)) == 2 * layers else 0
    steps = math.ceil((search.executed - until) / (sum(prices) / len(prices)) - 1e-6)
    steps = max(0, min(steps, len(search.candidates) - least))
    bar = tqdm(
        total=steps, desc=f"removal order ({kind})", unit="removal",
        disable=not (progress and steps),
    )  # fmt: skip
    with bar:
        while search.executed > until and len(search.candidates) > least:
            outdated = search.outdated(kind)
            if outdated:
                _measure(model, ids, units, prices, search, outdated, progress)
                continue
            unit = search.first()
            search.take(unit, prices[unit])
            keep(search)
            bar.set_postfix(loss=f"{search.loss:.3f}", executed=f"{search.executed:.3f}")
            bar.update()
    return search


def _measure(
    model: nn.Module,
    ids: Tensor,
    units: Sequence[Unit],
    prices: Sequence[float],
    search: Search,
    outdated: Sequence[int],
    progress: bool,
) -> None:
    """Bring the candidates ``outdated`` up to date; the first time also the dense loss."""
    gone, layers = [units[each.unit] for each in search.steps], len(blocks(model))
    first = math.isnan(search.dense)
    plans = [plan_without(layers, [*gone, units[unit]]) for unit in outdated]
    plans += [plan_without(layers, gone)] if first else []
    # One candidate alone is quick: no bar of its own.
    inner = progress and len(plans) > 1
    found = mean_losses(model, torch.stack(plans), ids, progress=inner, what="candidates").tolist()
    if first:
        search.dense = found.pop()
    for unit, after in zip(outdated, found, strict=True):
        rate = (after - search.loss) / prices[unit] if math.isfinite(after) else math.inf
        search.candidates[unit] = Candidate(rate, after, len(search.steps))


def greedy_kept(
    file: Path,
    model: nn.Module,
    ids: Tensor,
    units: Sequence[Unit],
    shares: Tensor,
    until: float,
    *,
    kind: SearchKind = "full",
    progress: bool = True,
) -> Search:
    """``greedy``, kept in ``file`` after each step and continued from there.

    What was kept may reach further than was asked. A garbled file counts as absent.
    """
    try:
        begun = Search.of_json(json.loads(file.read_text(encoding="utf-8")), len(units))
    except (OSError, ValueError, TypeError, KeyError):
        begun = Search.over(len(units))
    return greedy(
        model, ids, units, shares, until, kind=kind, begun=begun, progress=progress,
        keep=lambda search: write_atomically(file, json.dumps(search.to_json())),
    )  # fmt: skip


def key_of(model: nn.Module, ids: Tensor, *facts: Any, measured_by: str) -> str:
    """24 hex digits over what decides a measurement: model, dtype, kind of device, text, facts,
    and the code and libraries that measure: the module ``measured_by`` and what it imports."""
    from dyndepth.common.digests import fitting_code
    from dyndepth.common.provenance import versions
    from dyndepth.models.fingerprints import fingerprint

    parameter = next(model.parameters())
    whole = [
        fitting_code(measured_by),
        versions(),
        causal_lm(model).config._attn_implementation,
        fingerprint(model),
        str(parameter.dtype),
        parameter.device.type,
        list(ids.shape),
        hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest(),
        *facts,
    ]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:24]


# --- sublayers, as routers begin with them ------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """One step of ``removal_order``: ``loss`` (nats) and ``executed`` (share) after it."""

    layer: int
    sublayer: int
    loss: float
    executed: float


def removal_order(
    model: nn.Module, ids: Tensor, shares: Tensor, until: float, *, progress: bool = True
) -> list[Removal]:
    """Sublayers in the order in which a lazy greedy search removes them; see ``greedy``."""
    units = units_of(len(shares), "sublayer")
    return _rows(greedy(model, ids, units, shares, until, kind="lazy", progress=progress))


def cached_order(
    model: nn.Module, ids: Tensor, shares: Tensor, until: float, *, progress: bool = True
) -> list[Removal]:
    """``removal_order``, kept in the cache: all targets of one model share it.

    What was kept serves a later call if it reaches as far; otherwise it is continued.
    """
    key = key_of(model, ids, shares.tolist(), measured_by=__name__)
    file = cache_root() / "removal" / f"{key}.json"
    units = units_of(len(shares), "sublayer")
    return _rows(
        greedy_kept(file, model, ids, units, shares, until, kind="lazy", progress=progress)
    )


def _rows(search: Search) -> list[Removal]:
    return [Removal(*divmod(each.unit, 2), each.loss, each.executed) for each in search.steps]


def ranked_biases(damage: Tensor, low: float = 0.1, high: float = 1.5) -> Tensor:
    """Positive biases in the order of damage, evenly spaced: the most harmless flips first."""
    rank = damage.flatten().argsort().argsort().view_as(damage).float()
    return low + (high - low) * rank / max(damage.numel() - 1, 1)


def ordered_biases(
    order: list[Removal], damage: Tensor, executed: float, low: float = 0.1, high: float = 1.0
) -> Tensor:
    """Biases that execute the share ``executed`` at first: float32 ``[layers, 2]``.

    Sublayers removed before that share is reached get negative biases, the first one the lowest;
    the others positive ones, in the order of removal and then of ``damage``. The nearer a bias is
    to zero, the sooner training will change that sublayer's gates.
    """
    removed = [row for row in order if row.executed >= executed]
    if len(removed) < len(order):
        # Of the two sets around the share, the nearer one.
        following = order[len(removed)]
        before = removed[-1].executed if removed else 1.0
        if executed - following.executed < before - executed:
            removed = [*removed, following]
    place = {(row.layer, row.sublayer): rank for rank, row in enumerate(order)}
    every = sorted(
        ((layer, sublayer) for layer in range(len(damage)) for sublayer in range(2)),
        key=lambda at: (place.get(at, len(order)), float(damage[at])),
    )
    bias = torch.empty_like(damage)
    count = len(removed)
    for rank, at in enumerate(every):
        if rank < count:
            bias[at] = -(low + (high - low) * (count - 1 - rank) / max(count - 1, 1))
        else:
            bias[at] = low + (high - low) * (rank - count) / max(len(every) - count - 1, 1)
    return bias
