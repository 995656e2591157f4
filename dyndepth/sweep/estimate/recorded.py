"""Which cells of a sweep lie in its output path already, by the rule by which the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import Cell, cell_identity
from dyndepth.cells.identity import Row, cell_hash
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.models.shapes import is_shape
from dyndepth.sweep.driver import needed
from dyndepth.sweep.estimate.texts import offline
from dyndepth.sweep.workbench import (
    bring_tasks,
    identity_of_data,
    identity_of_weights,
    shared_identity,
)

if TYPE_CHECKING:
    from dyndepth.sweep.grid import Grid
    from dyndepth.sweep.settings import Settings

OF_WEIGHTS = ("model_fingerprint", "revision", "attn_implementation")
OF_DATA = ("num_fewshot", "data_fingerprint")


def has_cells(settings: Settings) -> bool:
    """Whether the run would look at cells that lie in its output path."""
    asked = settings.resume != "never" and not is_shape(settings.model)
    return asked and bool(Store(settings.output_path).files())


def recorded(
    settings: Settings, found: Grid, model: Any, corpus: Any, kind: str
) -> Sequence[tuple[str, Cell | None]]:
    """For each cell what remains to be done of it (see ``driver.needed``), and its record, if any.

    A ``model`` that was not loaded (None) is taken for the one of that name in the output path,
    tasks whose data is not here for those that were scored.
    """
    if not has_cells(settings):
        return [("everything", None)] * len(found.cells)
    known, unknown = _known(settings, found, model)
    shared = shared_identity(settings, found.documents, corpus, kind, known)
    there = {_key(cell.identity, unknown): cell for cell in Store(settings.output_path).all()}
    cells = [there.get(_key(cell_identity(cell, shared), unknown)) for cell in found.cells]
    return [(needed(cell, settings), cell) for cell in cells]


def _known(settings: Settings, found: Grid, model: Any) -> tuple[Row, tuple[str, ...]]:
    """What follows from weights and data, and the keys of which nobody knows it."""
    from dyndepth.evaluation.evaluate import quiet_lm_eval

    known: Row = dict.fromkeys((*OF_WEIGHTS, *OF_DATA))
    unknown: tuple[str, ...] = OF_WEIGHTS
    if model is not None:
        known |= identity_of_weights(model)
        unknown = ()
    try:
        with offline(), quiet_lm_eval():
            known |= identity_of_data(settings, bring_tasks(settings, list(found.documents)))
    except UserError:
        unknown += OF_DATA
    return known, unknown


def _key(identity: Row, unknown: Sequence[str]) -> str:
    return cell_hash(identity | dict.fromkeys(unknown, ""))
