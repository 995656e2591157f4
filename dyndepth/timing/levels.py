"""What is timed, how thoroughly and in which mode: shapes, levels, and how they are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from dyndepth.cells.times import Shape
from dyndepth.common.errors import UserError
from dyndepth.common.modes import EAGER, MODES
from dyndepth.data.capacity import check_length, longest

STEPS = 16
"""Steps that are decoded after a prompt where nobody says how many."""


@dataclass(frozen=True)
class Level:
    """How thoroughly is timed.

    Attributes:
        shapes: what is timed.
        texts: different batches of text that a shape cycles through.
        pairs: the least number a shape.
        most: the largest.
        warmup: the least number of rounds before them; on a GPU as many as there are texts, if
            those are more: some kernels are compiled for each shape that they meet.
        precision: a shape is done when the intervals of both phases reach this margin.
        seconds: or when, after the least number of pairs, this time is over; warm-up included.
    """

    shapes: tuple[Shape, ...]
    texts: int
    pairs: int
    most: int
    warmup: int
    precision: float
    seconds: float


LEVELS = {
    "quick": Level((Shape(1, 64, 2), Shape(4, 32, 2)), 6, 6, 15, 1, 0.03, 4.0),
    "full": Level((Shape(1, 512, 32), Shape(8, 256, 16)), 8, 9, 400, 2, 0.03, 900.0),
}
ON_CUDA = {
    "full": Level(
        (
            *(Shape(1, 512, 32), Shape(1, 2048, 0), Shape(8, 2048, 0)),
            *(Shape(8, 512, 32), Shape(32, 512, 32)),
            *(Shape(1, 4096, 32), Shape(8, 4096, 32), Shape(32, 4096, 32)),
        ),
        *(4, 9, 400, 2, 0.03, 120.0),
    )
}
"""Levels that are others on a GPU: it has idle cores where a processor has none."""


def level_of(level: str | Level, device: str) -> Level:
    """The level of that name on that kind of device; a Level is itself.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise UserError(f"timing level {level!r} is none of {', '.join(LEVELS)}")
    return ON_CUDA.get(level, LEVELS[level]) if device == "cuda" else LEVELS[level]


def what_fits(model_or_most: Any, level: str | Level, device: str) -> tuple[Level, list[Shape]]:
    """The level with the shapes that fit into the model, and those that do not.

    ``model_or_most`` is a model or the most tokens that it takes (None: any number).

    Raises:
        UserError: none of a named level's shapes fits, or one does not that was asked for by hand.
    """
    chosen = level_of(level, device)
    named = isinstance(level, str)
    most = model_or_most if isinstance(model_or_most, int | None) else longest(model_or_most)
    inside = tuple(s for s in chosen.shapes if most is None or s.length + s.new_tokens <= most)
    if not (named and inside):
        for shape in chosen.shapes:
            check_length(
                most,
                shape.length + shape.new_tokens,
                f"timing {shape}",
                "take a longer model, another level or shape, or none (--timing off)",
            )
    return replace(chosen, shapes=inside), [s for s in chosen.shapes if s not in inside]


def check_shapes(model_or_most: Any, level: str | Level, device: str = "cpu") -> None:
    """Raises UserError for a level that times more tokens than fit; see ``what_fits``."""
    what_fits(model_or_most, level, device)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Shapes from ``BATCHxLENGTH`` or ``BATCHxLENGTH+NEW``, separated by commas; NEW is ``STEPS``
    unless given, and 0 for the prompts alone.

    Raises:
        UserError: a text that is none, or a batch and length that stand there with several NEW.
    """
    found: dict[tuple[int, int], Shape] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,9})x(\d{1,9})(?:\+(\d{1,9}))?", word, re.ASCII)
        numbers = match.groups() if match else ("0", "0", "0")
        shape = Shape(*(STEPS if number is None else int(number) for number in numbers))
        if shape.batch < 1 or shape.length < 1:
            raise UserError(
                "--timing_shapes takes BATCHxLENGTH or BATCHxLENGTH+NEW, such as 1x512 or "
                f"32x2048+64, not {word!r}"
            )
        other = found.setdefault(shape[:2], shape)
        if other != shape:
            raise UserError(
                f"--timing_shapes has {shape.batch}x{shape.length} twice, with {other.new_tokens} "
                f"and with {shape.new_tokens} new tokens; give it once"
            )
    if not found:
        raise UserError("--timing_shapes is empty; give at least one, such as 1x512")
    return tuple(found.values())


def modes_of(mode: str | None, level: str, device: str) -> tuple[str, ...]:
    """The modes that ``mode`` names: ``eager``, ``graphs`` or ``both``; None is both where a GPU is
    timed in full, else eager. ``device`` is the kind of device.

    Raises:
        UserError: graphs without a GPU.
    """
    if mode is None:
        mode = "both" if device == "cuda" and level == "full" else EAGER
    if mode != EAGER and device != "cuda":
        raise UserError("graphs need a CUDA device; take --mode eager")
    return MODES if mode == "both" else (mode,)
