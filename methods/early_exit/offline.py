"""What every threshold would do, from one pass at full depth.

The pass reads each token's confidence at each candidate exit and, where targets are given, what it
would predict if it left there. A token leaves at the first candidate where its confidence reaches
the threshold: running maxima say where; sorted once and summed, they answer any number of
thresholds together.

What is said of a token is exact as long as all that it sees ran at full depth: up to and including
the first token of its sequence that leaves. Later ones see, in the blocks above, keys and values
propagated from where others left (``project``); of them it is a prediction. Who leaves at the first
candidate is exact for all tokens, since every token runs the blocks below; so with one candidate
the whole speedup is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from dyndepth.common.digests import method_code
from dyndepth.common.files import build_once, cache_root
from dyndepth.fitting.removal import key_of
from dyndepth.method import ForwardContext, Gate
from dyndepth.models.blocks import blocks, decoder
from dyndepth.runtime.attach import attach
from dyndepth.runtime.flops import BlockCosts

from .rule import ExitRule

_FILE = "confidence.safetensors"


@dataclass(frozen=True, eq=False)
class Table:
    """Tokens of some sequences at each candidate exit; where there is one more, it is full depth.

    Attributes:
        depth: blocks that a token executes which leaves there, int64 ``[exits + 1]``.
        share: of its block FLOPs that it executes, float64 ``[exits + 1]``.
        confidence: float32 ``[exits, sequences, tokens]``.
        log_probability: of the token's target, in nats, float32 ``[exits + 1, sequences, tokens]``.
        likeliest: whether that is the likeliest token, bool, of the same shape.
    """

    depth: Tensor
    share: Tensor
    confidence: Tensor
    log_probability: Tensor | None = None
    likeliest: Tensor | None = None

    def since(self, position: int) -> Table:
        """The same of the tokens from ``position`` on; those before are the prompt."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return replace(self, **{k: v[..., position:] for k, v in parts.items() if v is not None})

    @cached_property
    def best(self) -> Tensor:
        """The highest confidence so far, float32 ``[exits, sequences, tokens]``."""
        return self.confidence.cummax(0).values

    @cached_property
    def _sorted(self) -> torch.return_types.sort:
        """``best`` of each exit in ascending order, and the tokens in that order."""
        return self.best.flatten(1).sort(1)

    def exits(self, threshold: float) -> Tensor:
        """Number of the exit at which each token leaves: int64 ``[sequences, tokens]``."""
        return (self.best < threshold).sum(0)

    def exact(self, threshold: float) -> Tensor:
        """Of which tokens the table is exact, bool ``[sequences, tokens]``; see the module."""
        leaves = (self.exits(threshold) < len(self.best)).long()
        return leaves.cumsum(-1) == leaves

    def mean(self, values: Tensor, thresholds: Tensor) -> Tensor:
        """Mean over the tokens of ``values`` where each leaves: float64 ``[n]``.

        ``values`` is ``[exits + 1, sequences, tokens]``, ``thresholds`` ``[n]``.
        """
        flat = values.double().expand(-1, *self.best.shape[1:]).flatten(1)
        best, order = self._sorted
        # A token that stays past an exit gains the step to the next. Those that stay past it are
        # the first so many in its order.
        gained = pad(flat.diff(dim=0).gather(1, order).cumsum(1), (1, 0))
        stay = torch.searchsorted(best, thresholds.to(best).repeat(len(best), 1))
        return (flat[0].sum() + gained.gather(1, stay).sum(0)) / flat.shape[1]

    def executed(self, thresholds: Tensor) -> Tensor:
        """Mean number of executed blocks at each threshold: float64 ``[n]``."""
        return self.mean(self.depth[:, None, None], thresholds)

    def speedup(self, thresholds: Tensor) -> Tensor:
        """Dense block FLOPs / executed block FLOPs at each threshold: float64 ``[n]``."""
        return 1 / self.mean(self.share[:, None, None], thresholds)


def table(
    method: ExitRule, model: nn.Module, windows: Tensor, targets: Tensor | None = None
) -> Table:
    """The table of ``windows``, int64 ``[sequences, tokens]``, each its own document; on the CPU.

    ``targets``, of the same shape, are the tokens of which the probability is wanted. ``method``
    gives the confidence and the candidates; neither its target nor its phases matter.
    """
    return _table(method, model, windows, *_pass(method, model, windows, targets))


def kept_table(method: ExitRule, model: nn.Module, windows: Tensor) -> Table:
    """``table`` without targets, whose pass is made once for all targets, phases and processes.

    What it recorded lies under ``cache_root()/early_exit/<key>``, addressed by content; what can't
    be read there is made again.
    """
    exits = list(method.exits(len(blocks(model))))
    code = method_code(type(method))
    key = key_of(model, windows, method.confidence, exits, code, measured_by=__name__)
    folder = cache_root() / method.name / key

    def build(work: Path) -> None:
        save_file({"confidence": _pass(method, model, windows)[0]}, work / _FILE)

    def read() -> Tensor | None:
        try:
            found = load_file(folder / _FILE).get("confidence")
        except (OSError, SafetensorError):
            return None
        return found if found is not None and found.shape == (len(exits), *windows.shape) else None

    build_once(folder, build, lambda: read() is not None)
    found = read()
    assert found is not None
    return _table(method, model, windows, found)


def _table(method: ExitRule, model: nn.Module, windows: Tensor, *recorded: Tensor) -> Table:
    costs = BlockCosts.of(model)
    blocks_run = torch.from_numpy(costs.attention(windows.shape[1]) + costs.mlp).double().cumsum(0)
    depth = torch.tensor([*method.exits(len(blocks_run)), len(blocks_run)])
    return Table(depth, (blocks_run / blocks_run[-1])[depth - 1], *recorded)


class _Recorder(ExitRule):
    """Lets nobody go, and records of each forward what the candidates say of every token."""

    wanted: Tensor | None

    def start(self, context: ForwardContext) -> Tensor | None:
        self.confidences: list[Tensor] = []
        self.predictions: list[Tensor] = []
        return super().start(context)

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        if layer in self._exits:
            self.confidences.append(self.token_confidence(hidden).cpu())
            if self.wanted is not None:
                self.predict(self.context.readout(hidden, self._running))
        self._previous = hidden
        return True, True

    def predict(self, logits: Tensor) -> None:
        """Log-probability of the wanted tokens, and whether they are the likeliest."""
        assert self.wanted is not None
        wanted = self.wanted.to(logits.device)
        log = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        self.predictions.append(torch.stack((log, (logits.argmax(-1) == wanted).float())).cpu())


@torch.no_grad()
def _pass(
    method: ExitRule, model: nn.Module, windows: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Confidences, and log-probabilities and hits where there are targets; as in ``Table``."""
    # Any target above 1: at 1.0 it would ask no confidence.
    probe = _Recorder(
        target_speedup=2.0,
        phases="both",
        confidence=method.confidence,
        first_exit=method.first_exit,
        every=method.every,
    )
    probe.facts["threshold"] = float("inf")
    confidences, predictions = [], []
    with attach(model, probe, warn=False) as trace:
        # One by one: a window's logits are all that is held of that size.
        for row, ids in enumerate(windows.to(next(model.parameters()).device)):
            probe.wanted = None if targets is None else targets[row]
            out = decoder(model)(input_ids=ids[None], use_cache=False)
            confidences.append(torch.stack(probe.confidences))
            if targets is not None:
                final = out.last_hidden_state[0]
                probe.predict(trace.readout(final, torch.zeros_like(ids)))
                predictions.append(torch.stack(probe.predictions))
    confidence = torch.stack(confidences, 1)
    if not predictions:
        return (confidence,)
    log, hit = torch.stack(predictions, 2).unbind(1)
    return confidence, log, hit.bool()
