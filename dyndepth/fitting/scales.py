"""Scales: by how much a sublayer lengthens the stream, which it may do without being executed.

A plan that leaves a sublayer out leaves the stream as long as it was, while later sublayers, whose
norms make them blind to that, write as much as ever. Where the stream is multiplied by what the
sublayer would have lengthened it by, old and new keep their weights (arXiv 2501.02336).
The factors are measured on calibration text by one pass at full depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import fitting
from dyndepth.method import Reading

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus

Kind = Literal["token", "tensor"]
WINDOWS, LENGTH = 16, 256
"""Of the text that is measured on, where nothing else is asked for."""


@dataclass(frozen=True)
class Lengthening:
    """Length of the stream after a sublayer over that before it, ``[layers][2]``.

    Attributes:
        token: mean over all tokens of the ratio of their lengths.
        tensor: mean over the windows of the ratio of the lengths of a window's whole tensors, which
            few tokens with huge states decide.
    """

    token: list[list[float]]
    tensor: list[list[float]]


def lengthening(model: nn.Module, ids: Tensor, *, progress: bool = True) -> Lengthening:
    """Of every sublayer of ``model`` on the windows ``ids`` ``[windows, length]``, kept.

    In a parallel block each sublayer is measured by itself, from the block's input.
    """
    from dyndepth.fitting.unit_scores import kept
    from dyndepth.models.blocks import blocks

    shape = [[None, None]] * len(blocks(model))
    make = lambda: _measured(model, ids, progress)  # noqa: E731
    return Lengthening(
        **kept("lengthening", model, ids, make, {"token": shape, "tensor": shape}, by=__name__)
    )


@torch.no_grad()
def _measured(model: nn.Module, ids: Tensor, progress: bool) -> dict[str, Any]:
    from tqdm.auto import tqdm

    from dyndepth.fitting.unit_scores import TOKENS_AT_ONCE, watched
    from dyndepth.models.blocks import Decoder
    from dyndepth.models.rotary import forget

    parts = Decoder.of(model)
    sums = torch.zeros(2, len(parts.layers), 2, dtype=torch.float64)
    rows = max(1, TOKENS_AT_ONCE // ids.shape[1])
    bar = tqdm(total=len(ids), desc="scales", unit="window", disable=not progress)
    forget(model)
    with bar, watched(parts.blocks) as seen:
        for part in ids.split(rows):
            parts.owner(input_ids=part, use_cache=False)
            for layer, block in enumerate(parts.blocks):
                x, y, z = (seen[layer, place].float() for place in range(3))
                fed = (x, x + z - y) if block.parallel else (y, z)
                for sublayer, (before, after) in enumerate(((x, y), fed)):
                    token, tensor = _ratios(before, after)
                    sums[0, layer, sublayer] += token
                    sums[1, layer, sublayer] += tensor
            seen.clear()
            bar.update(len(part))
    sums[0] /= ids.numel()
    sums[1] /= len(ids)
    return {"token": sums[0].tolist(), "tensor": sums[1].tolist()}


def _ratios(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Sums of both kinds of ratio over streams ``[windows, length, hidden]``."""
    old, new = before.norm(dim=-1).double(), after.norm(dim=-1).double()
    return float((new / old).sum()), float((new.norm(dim=-1) / old.norm(dim=-1)).sum())


class Scaling:
    """What a method with a static plan inherits to have a field ``scale``: None, or a ``Kind``.

    ``measure_scales`` belongs into its ``fit`` and ``calibrate``; what it leaves in ``facts`` is
    ``scales``, ``[layers][2]``, None where the plan executes.
    """

    capturable: ClassVar[bool] = True

    scale: Any
    facts: dict[str, Any]
    name: ClassVar[str]
    target_speedup: float

    @property
    def substitutes(self) -> bool:
        """Whether skipped sublayers are scaled at all."""
        return self.scale is not None and self.target_speedup > 1.0

    def measure_scales(
        self,
        model: nn.Module,
        corpus: Corpus | None,
        plan: Tensor,
        *,
        windows: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        """Measure on calibration text what ``plan``, bool ``[layers, 2]``, leaves out of ``model``.

        Raises UserError without a corpus, or if its calibration split is too short.
        """
        if not self.substitutes:
            return
        if corpus is None:
            raise UserError(f"{self.name} measures its scales on text; give fit a corpus")
        ids = corpus.windows(
            length or fitting(model, LENGTH),
            windows or WINDOWS,
            seed,
            split="calibration",
            model=model,
        ).to(next(model.parameters()).device)
        found = getattr(lengthening(model, ids), self.scale)
        self.facts["scales"] = [
            [None if runs else factor for runs, factor in zip(*both, strict=True)]
            for both in zip(plan.tolist(), found, strict=True)
        ]

    def scale_readings(self, windows: int | None = None, length: int | None = None) -> Any:
        """What ``measure_scales`` reads, for ``expenses``: a tuple of ``Reading``."""
        if not self.substitutes:
            return ()
        return (Reading(windows=windows or WINDOWS, length=length or LENGTH, kept=True),)

    def check_scales(self, layers: int) -> None:
        """Raises UserError where the scales are of a model of other depth than ``layers``."""
        if self.substitutes and len(self.facts["scales"]) != layers:
            raise UserError(
                f"{self.name}: these scales are for a model of {len(self.facts['scales'])} blocks, "
                f"not {layers}; fit the method on this model"
            )

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor:
        """Skipped: the stream times its scale."""
        return rows * (self.facts["scales"][layer][sublayer] - 1)
