"""What methods share that route tokens by one trained gate a block.

The model is frozen; a router a block says for each token whether the block runs. Its parameters are
trained under the masked backend by ``routers.tune_router``; then the logit from which blocks run is
solved on calibration text so that the measured block speedup meets the target. A method says which
blocks have a router, what a router is, and how hard to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.fitting.calibration import meet_target
from dyndepth.fitting.loop import Schedule
from dyndepth.fitting.router_checks import check_depth, check_numbers, check_width
from dyndepth.fitting.routers import Router, Tuning, see_streams, tune_router
from dyndepth.method import (
    DynamicDepthMethod,
    Expenses,
    ForwardContext,
    Gate,
    Granularity,
    Reading,
)
from dyndepth.models.blocks import Decoder

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus


ALWAYS = 1e4
"""Logit of a block that has no router."""

_SPAN = 50.0
_CALIBRATION_WINDOWS, _CALIBRATION_LENGTH = 8, 256
# For an estimate: of at most twelve.
_CALIBRATION_ROUNDS = 4


class GateRouter(Router):
    """One logit a block; a block runs where it reaches the method's threshold.

    ``routed`` are the blocks that have a router, in order; the first dimension of every parameter
    is theirs. Subclasses say ``logits``.
    """

    def __init__(self, routed: range, **tables: Tensor) -> None:
        super().__init__()
        self.routed = routed
        for name, table in tables.items():
            setattr(self, name, nn.Parameter(table.float()))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """``[batch, tokens, hidden] -> [batch, tokens, 1]``, on the stream's device, float32."""
        if layer not in self.routed:
            return hidden.new_full((*hidden.shape[:-1], 1), ALWAYS, dtype=torch.float32)
        return self.logits(self.routed.index(layer), hidden.float())[..., None]

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """Of the router ``row``: ``[..., hidden] -> [...]``, both float32."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """What the method keeps, by name, on the CPU: all that the class is made of."""
        return {name: each.detach().cpu() for name, each in self.named_parameters()}

    def flops(self) -> float:
        """Of one router on one token."""
        raise NotImplementedError


@dataclass(kw_only=True)
class BlockRouting(DynamicDepthMethod):
    """A method with a router a block. Subclasses say ``routed``, ``initial`` and ``built``.

    Fields:
        phases: ``both``, or ``generation`` (full depth on the prompt).
        objective, penalty, weight_rate, bias_rate, adapter_rate: as in
            ``dyndepth.fitting.routers.Tuning``.
        steps, batch, length: as in ``dyndepth.fitting.loop.Schedule``.
    """

    granularity: ClassVar[Granularity] = "token"
    needs_training: ClassVar[bool] = True

    phases: Literal["generation", "both"] = "both"
    objective: Literal["ce", "kl"] = "ce"
    penalty: float = 8.0
    weight_rate: float = 1e-3
    bias_rate: float = 2e-2
    adapter_rate: float = 1e-3
    steps: int = 150
    batch: int = 4
    length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("penalty", "weight_rate", "bias_rate", "adapter_rate")
        check_numbers(self, {"steps": 1, "batch": 1, "length": 4}, positive)

    # --- what a method says ---------------------------------------------------------------------

    def routed(self, layers: int) -> range:
        """The blocks that have a router, of ``layers``."""
        raise NotImplementedError

    def initial(self, model: nn.Module, corpus: Corpus) -> Any:
        """A router to be trained, with ``folded``."""
        raise NotImplementedError

    def built(self, layers: int) -> Any:
        """The router that ``self.tensors`` hold, with ``flops``."""
        raise NotImplementedError

    @property
    def first_tokens(self) -> int:
        """Tokens at the beginning of each sequence that execute everything."""
        return 0

    def tuning(self) -> Tuning:
        """What the training asks of the routers."""
        return Tuning(
            target_speedup=self.target_speedup,
            penalty=self.penalty,
            objective=self.objective,
            weight_rate=self.weight_rate,
            bias_rate=self.bias_rate,
            adapter_rate=self.adapter_rate,
            phases=self.phases,
            keep_first=self.first_tokens,
            kv_policy=self.kv_policy,
        )

    # --- the fit --------------------------------------------------------------------------------

    def max_speedup(self, layers: int) -> float:
        """The blocks without a router alone."""
        kept = layers - len(self.routed(layers))
        return layers / kept if kept else float("inf")

    def expenses(
        self, layers: int, model: nn.Module | None = None, corpus: Corpus | None = None
    ) -> Expenses:
        """The training's, and the solved threshold's; for an estimate."""
        if self.target_speedup == 1.0:
            return Expenses()
        dense = self.objective == "kl"
        return Expenses(
            fit=(
                Reading(
                    windows=self.steps * self.batch,
                    length=self.length,
                    # A gate that is trained is computed whether or not it is open.
                    forwards=1.0 + dense,
                    backwards=1.0,
                    heads=3.0 + dense,
                ),
                Reading(
                    windows=_CALIBRATION_WINDOWS,
                    length=min(2 * self.length, _CALIBRATION_LENGTH),
                    # At full depth once, for a first guess.
                    forwards=1.0 + _CALIBRATION_ROUNDS / self.target_speedup,
                ),
            )
        )

    def fit(self, model: nn.Module, corpus: Corpus | None = None) -> Self:
        """Train the routers and solve their threshold.

        Raises UserError if ``corpus`` is None or the target is beyond reach.
        """
        if self.target_speedup == 1.0:
            return self
        layers, hidden = Decoder.of(model).shape
        most = self.max_speedup(layers)
        if self.target_speedup > most:
            raise UserError(
                f"{self.name} has routers on {len(self.routed(layers))} of these {layers} blocks: "
                f"a speedup of at most {most:g}, not {self.target_speedup:g}"
            )
        corpus = self._text(corpus)
        router = self.initial(model, corpus).to(next(model.parameters()).device)
        schedule = Schedule.of(self)
        windows = corpus.reader(self.length, schedule.windows, self.seed, model=model)
        self.curve = tune_router(model, router, windows, self.tuning(), schedule, seed=self.seed)
        self.tensors = router.folded()
        self.facts = {
            "layers": layers,
            "hidden": hidden,
            "tokens": int(self.curve[-1]["tokens"]),
        }
        self.calibrate(model, corpus)
        return self

    def calibrate(self, model: nn.Module, corpus: Corpus | None = None) -> None:
        """Solve the threshold for the model as it is now."""
        if self.target_speedup == 1.0:
            return
        length = fitting(model, min(2 * self.length, _CALIBRATION_LENGTH))
        windows = self._text(corpus).windows(
            length, _CALIBRATION_WINDOWS, self.seed, split="calibration", model=model
        )
        meet_target(model, self, windows, span=_SPAN, first=self._guess(model, windows))

    def _guess(self, model: nn.Module, windows: Tensor) -> tuple[float, float]:
        """Near which threshold the target is met, and a step on the way: the logits of the dense
        model's streams, of which a share as large as the target leaves are above it."""
        layers = len(Decoder.of(model).layers)
        routed, found = self.routed(layers), []
        router = self.built(layers).to(next(model.parameters()).device)

        def see(layer: int, stream: Tensor) -> None:
            if layer in routed:
                found.append(router(layer, stream).flatten().cpu())

        see_streams(model, windows, see)
        skipped = min((1 - 1 / self.target_speedup) * layers / len(routed), 1.0)
        ranked = torch.cat(found).sort().values
        places = (torch.tensor([skipped, skipped - 0.02, skipped + 0.02]) * len(ranked)).long()
        at, below, above = ranked[places.clamp(0, len(ranked) - 1)].tolist()
        return at, max((above - below) / 2, 1e-4)

    def _text(self, corpus: Corpus | None) -> Corpus:
        if corpus is None:
            raise UserError(
                f"{self.name} finds its routers and their threshold on text; give fit a corpus"
            )
        return corpus

    # --- the rule -------------------------------------------------------------------------------

    def start(self, context: ForwardContext) -> Tensor | None:
        """A full plan at target 1.0, else none.

        Raises UserError if the routers are missing or of a model of another depth.
        """
        self.context = context
        self._logits: Tensor | None = None
        if self.target_speedup == 1.0:
            return torch.ones(context.layers, 2, dtype=torch.bool)
        depth = self.facts["layers"] if "bias" in self.tensors else None
        check_depth(self, depth, context.layers)
        self.tensors = {name: each.to(context.device) for name, each in self.tensors.items()}
        self._router: Any = self.built(context.layers).requires_grad_(False)
        self._routed = self.routed(context.layers)
        self._kept = self._first(context)
        return None

    @torch.no_grad()
    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """One decision for both sublayers of a block, at its entry.

        Raises UserError if the routers are of a model of another width.
        """
        if layer not in self._routed:
            return True, True
        check_width(self.facts["hidden"], hidden.shape[-1])
        self.context.bill("router", self._router.flops(), None)
        self._logits = self._router(layer, hidden)
        gate = self._logits[..., 0] >= self.facts["threshold"]
        if self._kept is not None:
            gate = gate | self._kept.to(gate.device)
        return gate, gate

    def _first(self, context: ForwardContext) -> Tensor | None:
        """Which tokens execute everything, in memory that stays where it is: graphs read it."""
        if not self.first_tokens:
            return None
        found = context.positions < self.first_tokens
        known: dict[Any, Tensor] = self.__dict__.setdefault("_first_of", {})
        key = (tuple(found.shape), found.device)
        if key not in known:
            with torch.inference_mode(False):
                known[key] = torch.empty_like(found)
        return known[key].copy_(found)
