"""Importance of a model's blocks or sublayers on calibration text: in which order could they go?

Criteria, lowest score first to go (formulas and defaults as published):

* ``block_influence``: 1 - cosine of the streams before and after a block (arXiv 2403.03853);
* ``angular``: angle between the streams before and after a run of blocks, at the last token of
  each window; the run with the least angle goes as a whole (arXiv 2403.17887);
* ``perplexity``: loss without the unit; ``taylor``: sum of |weight x gradient| over the unit's
  weight matrices and norms (arXiv 2402.02834);
* ``greedy``: loss without the unit, measured again after each removal (arXiv 2402.09025);
* ``attention``, ``mlp``, ``joint``: 1 - cosine of the streams before and after a sublayer
  (arXiv 2406.15786);
* ``last`` (the deepest first) and ``random`` need no text.

All cosines are of the raw stream: what leaves the last block is taken before the final norm. They
come from one dense pass; ``dyndepth.fitting.unit_scores`` measures, and keeps what it finds. As a
command: ``python -m dyndepth.importance``, see ``dyndepth.importance``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dyndepth.common.errors import UserError
from dyndepth.common.spec import nearest
from dyndepth.data.capacity import fitting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dyndepth.data.corpus import Corpus
    from dyndepth.fitting.removal import Search, SearchKind, Unit


UnitKind = Literal["block", "sublayer"]


@dataclass(frozen=True)
class Criterion:
    """What is peculiar to one criterion.

    Attributes:
        kinds: of units that it ranks, its own first.
        label: what the score is.
        text: calibration windows and their length where none are asked for; None: needs no text.
        keep: blocks protected at the two ends, as published.
        only: the one sublayer that it ranks, None for both.
    """

    kinds: tuple[UnitKind, ...]
    label: str
    text: tuple[int, int] | None
    keep: tuple[int, int] = (0, 0)
    only: str | None = None


_BLOCKS: tuple[UnitKind, ...] = ("block",)
_SUBLAYERS: tuple[UnitKind, ...] = ("sublayer",)
_EITHER: tuple[UnitKind, ...] = ("block", "sublayer")
_COSINE = "1 − cosine similarity"

CRITERIA: dict[str, Criterion] = {
    "block_influence": Criterion(_BLOCKS, _COSINE, (32, 128)),
    "angular": Criterion(_BLOCKS, "angle / π, last token", (32, 128)),
    "perplexity": Criterion(_EITHER, "loss without it, nats", (10, 128), (4, 2)),
    "greedy": Criterion(_EITHER, "loss after it went, nats", (8, 128), (1, 1)),
    "taylor": Criterion(_EITHER, "Σ |weight × gradient|", (10, 128), (4, 2)),
    "attention": Criterion(_SUBLAYERS, _COSINE, (32, 128), only="attention"),
    "mlp": Criterion(_SUBLAYERS, _COSINE, (32, 128), only="mlp"),
    "joint": Criterion(_SUBLAYERS, _COSINE, (32, 128)),
    "last": Criterion(_EITHER, "place in the order", None),
    "random": Criterion(_EITHER, "place in the order", None, (1, 1)),
}


def criterion_named(name: str) -> Criterion:
    """The criterion ``name``. Raises UserError, with the nearest names, if there is none."""
    if name not in CRITERIA:
        raise UserError(
            f"unknown criterion {name!r}; {nearest(name, CRITERIA)}there are {', '.join(CRITERIA)}"
        )
    return CRITERIA[name]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is ranked, by what, on which text. None: the criterion's own.

    Attributes:
        criterion: a key of ``CRITERIA``.
        unit: ``block`` or ``sublayer``.
        windows, length: of calibration text; where none is read, ``length`` is 128 and only says
            for how many keys attention is counted.
        seed: of the text's windows, and of ``random``.
        search: ``full`` or ``lazy``, for ``greedy`` (see ``dyndepth.fitting.removal``).
        keep_first, keep_last: blocks at either end that are never ranked. As published, they
            shrink on models where they would protect more than half of the blocks.
    """

    criterion: str = "block_influence"
    unit: UnitKind | None = None
    windows: int | None = None
    length: int | None = None
    seed: int = 0
    search: SearchKind = "full"
    keep_first: int | None = None
    keep_last: int | None = None

    def __post_init__(self) -> None:
        kinds = criterion_named(self.criterion).kinds
        if self.unit not in (None, *kinds):
            raise ValueError(
                f"the criterion {self.criterion} ranks {kinds[0]}s only, so unit must be "
                f"{kinds[0]}, not {self.unit}"
            )
        for name, least in (("windows", 1), ("length", 2), ("keep_first", 0), ("keep_last", 0)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{name} must be at least {least}, not {given}")

    @property
    def kind(self) -> UnitKind:
        """Of the units that are ranked."""
        return self.unit or CRITERIA[self.criterion].kinds[0]

    def text_for(self, model: nn.Module) -> tuple[int, int]:
        """Windows and their length: what was asked for, else the criterion's own, cut to what
        fits; no windows for criteria without text."""
        windows, length = CRITERIA[self.criterion].text or (0, 128)
        return (windows and (self.windows or windows)), self.length or fitting(model, length)

    def keep(self, layers: int) -> tuple[int, int]:
        """Protected blocks at the two ends of a model of ``layers`` blocks."""
        first, last = CRITERIA[self.criterion].keep
        share = min(1.0, layers / 2 / max(1, first + last))
        first, last = int(first * share), int(last * share)
        return (
            first if self.keep_first is None else self.keep_first,
            last if self.keep_last is None else self.keep_last,
        )

    def candidates(self, layers: int) -> list[Unit]:
        """The units that are ranked, in the order of the forward."""
        from dyndepth.fitting.removal import units_of
        from dyndepth.method import SUBLAYERS

        first, last = self.keep(layers)
        only = CRITERIA[self.criterion].only
        return [
            unit
            for unit in units_of(layers, self.kind)
            if first <= unit[0] // 2 < layers - last and only in (None, SUBLAYERS[unit[0] % 2])
        ]

    def ranked(self, layers: int, run: int = 1) -> list[Unit]:
        """The candidates. Raises UserError if there are none, or no run of so many blocks."""
        found = self.candidates(layers)
        if not found:
            raise UserError(f"all {layers} blocks are kept, so that none is left to rank")
        if self.criterion == "angular" and not 1 <= run <= len(found):
            raise UserError(f"a run holds 1 to {len(found)} blocks on this model, not {run}")
        return found


# --- ranking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Units by importance.

    Attributes:
        kind: ``block`` or ``sublayer``.
        order: units in the order in which they would go; ``greedy`` may name only some.
        scores: of each unit in ``order``.
    """

    kind: UnitKind
    order: list[Unit]
    scores: list[float]

    def rows(self) -> list[dict[str, Any]]:
        """A row a ranked unit, in the order of the forward: ``layer``, ``sublayer``, ``score``,
        ``rank`` (1 = first to go)."""
        from dyndepth.method import SUBLAYERS

        found = zip(self.order, self.scores, range(1, len(self.order) + 1), strict=True)
        return [
            {
                "layer": unit[0] // 2,
                "sublayer": SUBLAYERS[unit[0] % 2] if self.kind == "sublayer" else "block",
                "score": score,
                "rank": rank,
            }
            for unit, score, rank in sorted(found)
        ]


def rank(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    *,
    until: float = 0.5,
    run: int = 1,
    progress: bool = True,
) -> Ranking:
    """The candidates of ``settings`` on ``model``, ranked.

    ``greedy`` stops when the share ``until`` of the block FLOPs is executed. ``angular`` scores
    each block as the first of a run of ``run``. Raises UserError for an unsupported model, no
    corpus where one is needed, or too little text.
    """
    from dyndepth.models.blocks import blocks

    units = settings.ranked(len(blocks(model)), run)
    if settings.criterion == "greedy":
        search = _greedy(model, corpus, settings, units, until, progress)
        order = [units[step.unit] for step in search.steps]
        return Ranking(settings.kind, order, [step.loss for step in search.steps])
    if settings.criterion == "angular":
        units = units[: len(units) - run + 1]
    scores = _scores(model, corpus, settings, units, run, progress)
    places = sorted(range(len(units)), key=lambda index: (scores[index], index))
    return Ranking(settings.kind, [units[i] for i in places], [scores[i] for i in places])


def _scores(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    units: list[Unit],
    run: int,
    progress: bool,
) -> list[float]:
    """A score a unit, for the criteria that rank at once."""
    import torch

    from dyndepth.fitting.removal import units_of
    from dyndepth.fitting.unit_scores import streams, taylor, without_each
    from dyndepth.models.blocks import blocks

    criterion, layers = settings.criterion, len(blocks(model))
    if criterion == "last":
        return [float(place) for place in reversed(range(len(units)))]
    if criterion == "random":
        generator = torch.Generator().manual_seed(settings.seed)
        return [float(place) for place in torch.randperm(len(units), generator=generator)]
    ids = calibration_text(model, corpus, settings)
    if criterion == "perplexity":
        # All are measured, whatever is protected: other settings share them.
        every = units_of(layers, settings.kind)
        measured = without_each(model, ids, settings.kind, progress=progress)
        return [measured[every.index(unit)] for unit in units]
    if criterion == "taylor":
        salience = [value for row in taylor(model, ids, progress=progress) for value in row]
        return [sum(salience[place] for place in unit) for unit in units]
    found = streams(model, ids, progress=progress)
    if criterion == "angular":
        return [found.angles[run - 1][unit[0] // 2] for unit in units]
    if settings.kind == "block":
        return [found.block[unit[0] // 2] for unit in units]
    return [found.sublayer[unit[0] // 2][unit[0] % 2] for unit in units]


def calibration_text(model: nn.Module, corpus: Corpus | None, settings: Settings) -> Tensor:
    """Calibration windows, int64 ``[windows, length]``, on the model's device.

    Raises UserError without a corpus, or if its calibration split is too short.
    """
    if corpus is None:
        raise UserError(f"the criterion {settings.criterion} reads text; give a corpus")
    windows, length = settings.text_for(model)
    ids = corpus.windows(length, windows, settings.seed, split="calibration", model=model)
    return ids.to(next(model.parameters()).device)


def _greedy(
    model: nn.Module,
    corpus: Corpus | None,
    settings: Settings,
    units: list[Unit],
    until: float,
    progress: bool,
) -> Search:
    """The greedy search, kept after each step: a later call that needs more goes on from there."""
    from dyndepth.common.files import cache_root
    from dyndepth.fitting.removal import greedy_kept, key_of
    from dyndepth.fitting.routers import budget_shares

    ids = calibration_text(model, corpus, settings)
    shares = budget_shares(model, ids.shape[1])
    key = key_of(model, ids, settings.search, units, shares.tolist(), measured_by=__name__)
    file = cache_root() / "importance" / f"greedy-{settings.kind}-{key}.json"
    return greedy_kept(
        file, model, ids, units, shares, until, kind=settings.search, progress=progress
    )
