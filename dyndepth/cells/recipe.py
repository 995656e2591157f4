"""How a cell is recovered: ``none``, or a recipe as ``lora(rank=8, steps=100)`` or ``joint``.

The canonical text of a recipe names every setting that matters, so that it is part of a cell's
identity and defaults may change. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal

from dyndepth.common.errors import UserError
from dyndepth.common.spec import checked, name_of, nearest, parameters_of, split

NONE = "none"
"""The canonical text of no recovery at all."""

KINDS = ("lora", "joint")
ROLES = ("query", "key", "value", "output", "gate", "up", "down")
"""Projections of a block that an adapter may sit on, by the names of
``dyndepth.models.families.Family``."""
ALL = "all"
"""As targets: all projections that the family has. As modules: all targets."""
USUAL_TARGETS = "query+value+gate"
RANKED = "ila"
"""As modules: the most significant ones, see ``dyndepth.fitting.recovery.significance``."""
RANKING: dict[str, Any] = {"keep": 0.3, "score_steps": 40, "score_rate": 0.1}
"""Settings that a recipe has with ``modules=ila`` alone, and what they are if not given."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.1,
        "steps": 10_000,
        "batch": 1,
        "accumulate": 8,
        "length": 4096,
        "rate": 2e-4,
        "warm_up": 0.1,
        "weight_decay": 0.01,
    }
}
"""``lora(preset=paper)``: stage 2 of arXiv 2506.04179, with the lengths of its released trainer."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to recover, the same for every method.

    Attributes:
        kind: ``lora``: the method as fitted, its gates frozen and on, and adapters trained under
            it. ``joint``: adapters trained together with the routers while the method is fitted.
        rank, alpha, dropout: of the adapters; the scale is alpha / rank, alpha by default 2 rank.
            Dropout is off by default: in a short training no token is seen twice.
        targets: roles of the adapted projections, joined by ``+``, or ``all``; by default
            ``query+value+gate``, with ``modules=ila`` ``all``.
        steps, batch, length, accumulate: optimiser steps, windows a micro-batch, tokens a window,
            micro-batches a step.
        rate: AdamW's learning rate. The published one is 2e-4 for 10,000 steps; so short a training
            as the default's needs more.
        warm_up: share of the steps in which the rate rises; then a cosine to zero.
        weight_decay: AdamW's.
        precision: of autocast.
        modules: ``all``: adapters on all targets. ``ila``: they are trained, a score a module is
            learned over them, and the modules with the highest are trained alone, anew.
        keep: ``ila``: share of the modules that are trained in the end.
        score_steps, score_rate: ``ila``: of learning the scores, by Adam.

    For ``joint`` everything from ``steps`` on is the method's own affair and can't be given.
    """

    joint_fields: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "targets")

    kind: Literal["lora", "joint"] = "lora"
    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | None = None
    steps: int = 40
    batch: int = 4
    length: int = 256
    accumulate: int = 1
    rate: float = 1e-3
    warm_up: float = 0.1
    weight_decay: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    modules: Literal["all", "ila"] = "all"
    keep: float | None = None
    score_steps: int | None = None
    score_rate: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        if self.targets is None:
            targets = ALL if self.modules == RANKED else USUAL_TARGETS
            object.__setattr__(self, "targets", targets)
        least = {"rank": 1, "steps": 1, "batch": 1, "length": 2, "accumulate": 1}
        positive = ["alpha", "rate"]
        for name, usual in RANKING.items():
            if self.modules == RANKED and getattr(self, name) is None:
                object.__setattr__(self, name, usual)
            elif self.modules != RANKED and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is of a recovery with modules={RANKED}; give that as well"
                )
        if self.modules == RANKED:
            least |= {"score_steps": 1}
            positive += ["score_rate"]
            if self.keep is not None and not 0 < self.keep <= 1:
                raise ValueError(f"keep must be above 0 and at most 1, not {self.keep}")
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("dropout", "warm_up", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(
                    f"targets names {role!r}; {nearest(role, ROLES)}roles are {', '.join(ROLES)}"
                )
        if self.targets != ALL:
            # Equal recipes have equal texts, in whatever order the roles were given.
            roles = [role for role in ROLES if role in self.roles]
            object.__setattr__(self, "targets", "+".join(roles))

    @property
    def roles(self) -> tuple[str, ...]:
        """The adapted projections of each block, each one of ``ROLES``; for ``all`` those that a
        family may have."""
        assert self.targets is not None
        if self.targets == ALL:
            return ROLES
        return tuple(role.strip() for role in self.targets.split("+"))

    @property
    def scale(self) -> float:
        """What the product of an adapter's factors is multiplied by."""
        assert self.alpha is not None
        return self.alpha / self.rank

    def __str__(self) -> str:
        """The canonical text; ``parse_recovery`` gives an equal recipe back."""
        return f"{self.kind}({', '.join(self._settings(whole=True))})"

    @property
    def short(self) -> str:
        """The text without what is as by default, for people."""
        inner = ", ".join(self._settings(whole=False))
        return f"{self.kind}({inner})" if inner else self.kind

    def _settings(self, whole: bool) -> list[str]:
        usual = Recipe(rank=self.rank, modules=self.modules)
        found = []
        # A text that says nothing of the modules means all: that of a recipe before there were any.
        left_out = set() if self.modules == RANKED else {"modules", *RANKING}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "kind" or (self.kind == "joint" and name not in self.joint_fields):
                continue
            if name in left_out:
                continue
            other = getattr(Recipe if name in ("rank", "modules") else usual, name)
            if whole or value != other:
                found.append(f"{name}={_written(value)}")
        return found


def parse_recovery(text: str) -> Recipe | None:
    """``none`` as None, else the recipe that ``text`` describes.

    ``preset=paper`` among the parameters sets all that the others do not. Raises UserError for
    another name, an unknown parameter, or a value of the wrong kind or out of range.
    """
    kind = name_of(text, "recovery")
    known = (NONE, *KINDS)
    if kind not in known:
        raise UserError(
            f"unknown recovery {kind!r}; {nearest(kind, known)}it is one of {', '.join(known)}"
        )
    given = parameters_of(text, "recovery")
    if kind == NONE:
        if given:
            raise UserError(f"recovery {NONE!r} takes no parameters, not {text.strip()!r}")
        return None
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise UserError(
            f"recovery {kind!r} has no preset {preset!r}; it has {', '.join(sorted(PRESETS))}"
        )
    hidden = {"kind"}
    if kind == "joint":
        hidden |= {field.name for field in fields(Recipe)} - set(Recipe.joint_fields)
    values = checked(Recipe, f"recovery {kind!r}", given, hidden)
    usual = {k: v for k, v in PRESETS.get(preset or "", {}).items() if k not in hidden}
    try:
        return Recipe(kind=kind, **{**usual, **values})  # type: ignore[arg-type]
    except (ValueError, OverflowError) as fault:
        raise UserError(f"recovery {kind!r}: {fault}") from fault


def parse_recoveries(texts: Iterable[str]) -> tuple[str, ...]:
    """Canonical texts of a list of recoveries, in order, each once; each entry may hold several.

    Raises UserError as ``parse_recovery`` does.
    """
    specs = [spec for text in texts for spec in split(text)]
    return tuple(dict.fromkeys(str(parse_recovery(spec) or NONE) for spec in specs))


@lru_cache(maxsize=1024)
def shortened(text: str) -> str:
    """A canonical text for people: ``Recipe.short``; a text of another version as it stands."""
    try:
        recipe = parse_recovery(text)
    except UserError:
        return text
    return recipe.short if recipe else NONE


def _written(value: Any) -> str:
    if isinstance(value, float):
        brief = f"{value:g}"
        return brief if float(brief) == value else repr(value)
    return str(value)


def refuse_drafts(method: Any, recipe: Recipe) -> None:
    """Raises UserError for the recovery of a method that speculates: adapters would make another
    model of the one that verifies."""
    if method.speculates:
        raise UserError(
            f"recovery {recipe.kind!r} trains weights, and {method.name} writes what the model as "
            "it is verifies; leave the method or the recovery out"
        )
