"""Which drafted tokens the whole model took: by their place in the draft, and by kind of token.

A token counts where it was judged: the whole model said what stands in its place. Those that follow
the first wrong one of a draft were not; they continue a text that was never written. Where a text
ended inside of a draft, the rest of that was judged all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dyndepth.generate.pieces import KINDS, kind
from dyndepth.generate.written import Generated, Proposal
from dyndepth.results.statistics.proportions import share

if TYPE_CHECKING:
    import pandas as pd


def by_position(written: Generated | Iterable[Generated]) -> pd.DataFrame:
    """A row for each place in a draft, from 1: see ``_table``. Its share is the probability that
    the token there stands if those before it do."""
    found: dict[int, list[bool]] = defaultdict(list)
    for proposal in _proposals(written):
        for place in range(proposal.judged):
            found[place + 1].append(place < proposal.accepted)
    return _table("position", {place: found[place] for place in sorted(found)})


def by_kind(written: Generated | Iterable[Generated]) -> pd.DataFrame:
    """A row for each kind of drafted token that was judged, in the order of ``KINDS``: see
    ``_table``."""
    found: dict[str, list[bool]] = defaultdict(list)
    for proposal in _proposals(written):
        for place, piece in enumerate(proposal.drafted[: proposal.judged]):
            found[kind(piece)].append(place < proposal.accepted)
    return _table("kind", {name: found[name] for name in KINDS if name in found})


def _table(name: str, found: dict[int, list[bool]] | dict[str, list[bool]]) -> pd.DataFrame:
    """``name``, ``judged`` and ``accepted`` tokens, and their share (``value``) from ``low`` to
    ``high``: Wilson's 95% interval, as if tokens were independent."""
    import pandas as pd

    rows = []
    for key, outcomes in found.items():
        held = share(sum(outcomes), len(outcomes))
        counts = {name: key, "judged": len(outcomes), "accepted": sum(outcomes)}
        rows.append({**counts, "value": held.value, "low": held.low, "high": held.high})
    return pd.DataFrame(rows, columns=[name, "judged", "accepted", "value", "low", "high"])


def _proposals(written: Generated | Iterable[Generated]) -> Iterable[Proposal]:
    several = [written] if isinstance(written, Generated) else written
    return (proposal for each in several for proposal in each.proposals)
