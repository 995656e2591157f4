"""What a model's units do on calibration text: streams, gradients, losses, measured once and kept.

One dense pass with hooks gives the cosines and angles of the residual stream, one backward a window
the gradients; ``dyndepth.fitting.removal`` gives the losses without a unit. Each measurement is a
file of its own under ``cache_root()/importance``. ``dyndepth.fitting.importance`` ranks by
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from dyndepth.common.files import cache_root, write_atomically
from dyndepth.fitting.removal import key_of, losses_alone, units_of
from dyndepth.fitting.routers import loss
from dyndepth.models.blocks import Block, Decoder, blocks
from dyndepth.models.rotary import forget
from dyndepth.runtime.patching import run_by

TOKENS_AT_ONCE = 1024
"""Of calibration text, in one dense pass."""


@dataclass(frozen=True)
class Streams:
    """How far units turn the residual stream, by one dense pass.

    Attributes:
        block: 1 - mean cosine over all tokens, ``[layers]``.
        sublayer: the same of attention and MLP, ``[layers][2]``.
        angles: ``[n - 1][l]``: mean of arccos(cosine) / pi over the windows' last tokens, between
            what enters block l and what leaves block l + n - 1.
    """

    block: list[float]
    sublayer: list[list[float]]
    angles: list[list[float]]


def streams(model: nn.Module, ids: Tensor, *, progress: bool = True) -> Streams:
    """Cosines and angles of ``model`` on the windows ``ids`` ``[windows, length]``, kept."""
    layers = len(blocks(model))
    shape = {
        "block": [None] * layers,
        "sublayer": [[None, None]] * layers,
        "angles": [[None] * (layers - n) for n in range(layers)],
    }
    make = lambda: _dense_pass(model, ids, progress)  # noqa: E731
    return Streams(**kept("streams", model, ids, make, shape))


@torch.no_grad()
def _dense_pass(model: nn.Module, ids: Tensor, progress: bool) -> dict[str, Any]:
    parts = Decoder.of(model)
    layers = len(parts.layers)
    sums = torch.zeros(layers, 3, dtype=torch.float64)
    angles: list[Tensor] = []
    rows = max(1, TOKENS_AT_ONCE // ids.shape[1])
    bar = tqdm(total=len(ids), desc="dense pass", unit="window", disable=not progress)
    forget(model)
    with bar, watched(parts.blocks) as seen:
        for part in ids.split(rows):
            parts.owner(input_ids=part, use_cache=False)
            for layer in range(layers):
                x, y, z = (seen[layer, place].float() for place in range(3))
                for column, (before, after) in enumerate(((x, z), (x, y), (y, z))):
                    cosine = cosine_similarity(before, after, dim=-1)
                    sums[layer, column] += cosine.double().sum().cpu()
            last = [seen[layer, 0][:, -1].double().cpu() for layer in range(layers)]
            last.append(seen[layers - 1, 2][:, -1].double().cpu())
            angles.append(_angles(torch.stack(last)))
            seen.clear()
            bar.update(len(part))
    scores = (1 - sums / ids.numel()).tolist()
    mean = torch.cat(angles, dim=-1).mean(-1)
    return {
        "block": [row[0] for row in scores],
        "sublayer": [row[1:] for row in scores],
        "angles": [[float(mean[at, at + n]) for at in range(layers + 1 - n)]
                   for n in range(1, layers + 1)],
    }  # fmt: skip


def _angles(points: Tensor) -> Tensor:
    """Angles between all pairs, as shares of pi: ``[n, batch, hidden] -> [n, n, batch]``."""
    unit = points / points.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    cosines = torch.einsum("ibh,jbh->ijb", unit, unit).clamp(-1, 1)
    return cosines.arccos() / math.pi


@contextmanager
def watched(split: Sequence[Block]) -> Iterator[dict[tuple[int, int], Tensor]]:
    """Streams of each forward, at full depth, by (block, place): before the block, between its
    sublayers, after it."""
    seen: dict[tuple[int, int], Tensor] = {}

    def run(index: int, stock: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        between, after = split[index].states(hidden, arguments)
        seen[index, 0], seen[index, 1], seen[index, 2] = hidden, between, after
        return after

    with run_by(split, run):
        yield seen


def taylor(model: nn.Module, ids: Tensor, *, progress: bool = True) -> list[list[float]]:
    """Sum of |weight x gradient of the mean loss| by sublayer, ``[layers][2]``, kept.

    A sublayer's weights are its matrices and its norms, without biases, as in the reference. The
    gradient is summed over the windows ``ids`` before the absolute value is taken.
    """
    shape = [[None, None]] * len(blocks(model))
    found: list[list[float]] = kept(
        "taylor", model, ids, lambda: _salience(model, ids, progress), shape
    )
    return found


def _salience(model: nn.Module, ids: Tensor, progress: bool) -> list[list[float]]:
    weights = [
        [
            parameter
            for module in modules
            if isinstance(module, nn.Module)
            for name, parameter in module.named_parameters()
            if name.endswith("weight")
        ]
        for block in blocks(model)
        for modules in (block.attention_modules, block.mlp_modules)
    ]
    flat = [parameter for unit in weights for parameter in unit]
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat]
    bar = tqdm(ids, desc="gradients", unit="window", disable=not progress)
    forget(model)
    with bar, _open(flat), torch.enable_grad():
        for window in bar:
            found = torch.autograd.grad(loss(model, window[None]) / len(ids), flat)
            for total, gradient in zip(gradients, found, strict=True):
                total += gradient
            del found
    each = iter(gradients)
    sums = [
        math.fsum(
            float((parameter.detach().float() * next(each)).abs().sum()) for parameter in unit
        )
        for unit in weights
    ]
    return [sums[place : place + 2] for place in range(0, len(sums), 2)]


@contextmanager
def _open(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, ``parameters`` take part in gradients; afterwards each does as before."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def without_each(model: nn.Module, ids: Tensor, kind: str, *, progress: bool = True) -> list[float]:
    """Loss in nats without each unit of ``kind`` alone, ``[units]``, kept; see ``units_of``."""
    units = units_of(len(blocks(model)), kind)
    found: list[float] = kept(
        f"without-{kind}",
        model,
        ids,
        lambda: losses_alone(model, ids, units, progress=progress)[1].tolist(),
        [None] * len(units),
    )
    return found


# --- keeping --------------------------------------------------------------------------------------


def kept(
    name: str,
    model: nn.Module,
    ids: Tensor,
    make: Callable[[], Any],
    shape: Any,
    by: str = __name__,
) -> Any:
    """Plain numbers from the cache, else made, ``by`` a module's code, and kept; garbled or of
    another shape: made again."""
    key = key_of(model, ids, name, measured_by=by)
    file = cache_root() / "importance" / f"{name}-{key}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if _shape(found) == shape:
            return found
    except (OSError, ValueError, TypeError):
        pass
    found = make()
    write_atomically(file, json.dumps(found))
    return found


def _shape(value: Any) -> Any:
    """Nested lists and mappings of numbers as nested lists and mappings of None."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return None if type(value) in (int, float) else value
