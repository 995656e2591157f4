"""What must fit into the device at once, while a cell is scored and while something is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyndepth.sweep.estimate.models import Shape

if TYPE_CHECKING:
    from dyndepth.method import Reading
    from dyndepth.sweep.estimate.passes import Pass

CHUNK = 2**24
"""Logits held at a time (``evaluation.scoring``): in their precision, and twice in float32."""
KEPT = 17
"""Values of the stream's width that a block keeps of a token for its gradients: the 34 bytes in
half precision of Korthikanti et al., arXiv 2205.05198, without attention's scores."""
OPTIMISER = 16
"""Bytes of a trained number: itself, its gradient, and two moments, in float32."""


@dataclass(frozen=True)
class Need:
    """Bytes: ``weights``, ``scoring`` and ``training`` beside them."""

    weights: float
    scoring: float
    training: float

    @property
    def most(self) -> float:
        """At the worst moment."""
        return self.weights + max(self.scoring, self.training)


def need(shape: Shape, passes: Sequence[Pass], readings: Sequence[Reading], trained: float) -> Need:
    """Of the largest forward and the longest window that is trained on; ``trained`` numbers are."""
    states = 4 * shape.hidden + 3 * shape.inner
    forwards = max(
        (
            shape.size * (one.rows * one.width * states + one.rows * one.keys * shape.cache)
            + min(CHUNK, max(one.heads, one.rows) * shape.vocabulary) * (shape.size + 8)
            for one in passes
        ),
        default=0.0,
    )
    windows = max((one.length for one in readings if one.backwards), default=0)
    kept = windows * shape.layers * KEPT * shape.hidden * shape.size
    logits = min(windows * shape.vocabulary, CHUNK) * 12
    training = kept + logits + trained * OPTIMISER if windows else 0.0
    return Need(shape.parameters * shape.size, forwards, training)
