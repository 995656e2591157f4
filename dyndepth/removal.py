"""What a model loses when sublayers are removed: each alone, and one after another.

Both are measured in next-token loss on a few windows, by sparse forwards. They tell routers where
to begin: with the sublayers that cost least.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dyndepth.assets import cache_root
from dyndepth.blocks import blocks
from dyndepth.method import DynamicDepthMethod, ForwardContext
from dyndepth.runtime import attach
from dyndepth.store import write_atomically
from dyndepth.training import loss

_VERSION = 1


class _Without(DynamicDepthMethod):
    """Everything but the sublayers that ``plan`` leaves out."""

    name: ClassVar[str] = "without"
    granularity: ClassVar[Any] = "static"
    paper: ClassVar[str] = "internal"

    def __init__(self, plan: Tensor) -> None:
        super().__init__()
        self.plan = plan

    def start(self, context: ForwardContext) -> Tensor:
        return self.plan


def _loss_with(model: nn.Module, ids: Tensor, plan: Tensor) -> float:
    with attach(model, _Without(plan)):
        return loss(model, ids).item()


@dataclass(frozen=True)
class Removal:
    """One step of ``removal_order``: ``loss`` (nats) and ``executed`` (share) after it."""

    layer: int
    sublayer: int
    loss: float
    executed: float


@torch.no_grad()
def removal_damage(model: nn.Module, ids: Tensor, *, progress: bool = True) -> Tensor:
    """Loss added by removing each sublayer alone, in nats: float32 ``[layers, 2]``.

    One forward a sublayer over the windows ``ids`` ``[batch, length]``, sparse.
    """
    dense = loss(model, ids)
    layers = len(blocks(model))
    damage = torch.empty(layers, 2)
    for index in tqdm(range(2 * layers), desc="damage", unit="sublayer", disable=not progress):
        plan = torch.ones(layers, 2, dtype=torch.bool)
        plan.view(-1)[index] = False
        damage.view(-1)[index] = _loss_with(model, ids, plan) - dense
    return damage


@torch.no_grad()
def removal_order(
    model: nn.Module, ids: Tensor, shares: Tensor, until: float, *, progress: bool = True
) -> list[Removal]:
    """Sublayers in the order in which a greedy search removes them, until ``until`` is executed.

    Each step removes the sublayer that adds least loss per share of the budget ``shares``
    ``[layers, 2]``, given all removals before it. As in lazy greedy selection (Minoux 1978), a
    candidate is measured again only when it comes to the top of the queue: removals mostly make
    each other worse, so an old value is mostly an underestimate. Measured: two to four forwards a
    step where a full search takes sixty.
    """
    layers = len(shares)
    plan = torch.ones(layers, 2, dtype=torch.bool)
    price = shares.cpu().flatten().tolist()
    current = loss(model, ids).item()
    damage = removal_damage(model, ids, progress=progress).flatten().tolist()
    # (added loss per share, sublayer, step at which it was measured, loss then)
    queue = [(d / price[i], i, 0, current + d) for i, d in enumerate(damage)]
    heapq.heapify(queue)
    found: list[Removal] = []
    executed = 1.0
    bar = tqdm(desc="removal order", unit="sublayer", disable=not progress)
    with bar:
        while executed > until and len(queue) > 1:
            _, index, measured, after = heapq.heappop(queue)
            if measured < len(found):
                plan.view(-1)[index] = False
                after = _loss_with(model, ids, plan)
                plan.view(-1)[index] = True
                heapq.heappush(queue, ((after - current) / price[index], index, len(found), after))
                continue
            plan.view(-1)[index] = False
            current, executed = after, executed - price[index]
            found.append(Removal(index // 2, index % 2, current, executed))
            bar.set_postfix(loss=f"{current:.3f}", executed=f"{executed:.3f}")
            bar.update()
    return found


def cached_order(
    model: nn.Module, ids: Tensor, shares: Tensor, until: float, *, progress: bool = True
) -> list[Removal]:
    """``removal_order``, kept in the cache: all targets of one model share it.

    What was kept serves a later call if it reaches as far; otherwise it is made again.
    """
    from dyndepth.models import fingerprint

    parameter = next(model.parameters())
    facts = [
        _VERSION,
        fingerprint(model),
        str(parameter.dtype),
        parameter.device.type,
        hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        shares.tolist(),
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    file = cache_root() / "removal" / f"{key}.json"
    try:
        kept = [Removal(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
        if kept and kept[-1].executed <= until:
            return kept
    except (OSError, ValueError, TypeError):
        pass  # absent or garbled: it is made again
    found = removal_order(model, ids, shares, until, progress=progress)
    write_atomically(file, json.dumps([asdict(row) for row in found]))
    return found


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
