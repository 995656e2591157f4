"""A study: the sweeps that a set of claims needs, and the claims, as plain data; and, at will, a
function that says what its committed run shows.

It lies with the methods: a ``Study`` that a distribution names in the entry-point group
``dyndepth.studies``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from dyndepth.cells.recipe import NONE, parse_recoveries
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED, check_path, slug
from dyndepth.results.numbers import Numbers
from dyndepth.sweep.settings import OTHERS, Settings, settings

GROUP = "dyndepth.studies"
SWEEP_KEYS = frozenset({"methods", "speedups", "seed", "recovery", "timing"})
"""What a study's sweeps may differ in; all else is shared, so that their cells compare."""

FLAGS = (
    *("model", "output_path", "limit", "speedups", "sample_seed", "num_fewshot", "batch_size"),
    *("device", "dtype", "attn_implementation", "revision", "trust_remote_code", "corpus"),
    *("timing", "resume", "dry_run", "debug"),
)
"""Settings of the sweep that may be given on a study's command line."""


@dataclass(frozen=True)
class Pick:
    """The cells of one method: ``method`` as ``--methods`` takes it, ``recovery`` as --recovery."""

    method: str
    recovery: str = NONE

    @property
    def recipe(self) -> str:
        """The recovery as a cell's identity writes it."""
        return parse_recoveries([self.recovery])[0]

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.method if self.recovery == NONE else f"{self.method} + {self.recovery}"


Kind = Literal[
    "equal_flops",
    "equal_total_flops",
    "equal_modules",
    "full_depth",
    "similarity",
    "reach",
    "sublayers",
    "position",
    "acceptance",
    "transfer",
    "identical",
]


@dataclass(frozen=True)
class Claim:
    """One claim, and the comparisons that speak for or against it.

    Attributes:
        name: a word for file columns.
        text: the claim in one sentence, as its source makes it.
        source: where it is made.
        a, b: the method it is about, and those that it is compared to one by one.
        kind: ``equal_flops``: at each of A's budgets, with B interpolated to it by block FLOPs.
            ``equal_total_flops``: by all FLOPs, what a method adds or cannot save included.
            ``equal_modules``: the same at equal shares of executed sublayers, an attention and an
            MLP counting alike. ``full_depth``: at each of A's budgets, with B as it is, whatever
            it executes. ``similarity``: as ``equal_flops``, by the cosine of the final hidden
            states with dense's, over evaluation passages. ``reach``: the least share of dense's
            block FLOPs at which A, and each B, is as good as dense. ``sublayers``: A's attention
            with A's MLPs, by executed fraction; ``position``: the second half of each document
            with its first, by executed fraction. The last two use no B, and like ``similarity``
            no metrics. Of methods that draft: ``acceptance``: the accepted share of drafted tokens
            after prompts of each task, the mean over documents of what it is in each, with B
            interpolated to the share of block FLOPs that A's drafts execute, the whole model as its
            own draft among B's points. ``transfer``: the same of A as fitted on texts of each task
            against A as it is, fitted on the corpus. ``identical``: the share of texts, of A and
            each B, that are token by token what dense writes. Their metrics are tasks, see
            ``acceptance.of``.
        metrics: pairs of task and metric.
        published: the number that the source gives, in a few words.
    """

    name: str
    text: str
    source: str
    a: Pick
    b: tuple[Pick, ...] = ()
    kind: Kind = "equal_flops"
    metrics: tuple[tuple[str, str], ...] = ()
    published: str = ""


@dataclass(frozen=True)
class Study:
    """Sweeps and claims.

    Attributes:
        name, title: for the command line; for people.
        sweeps: settings of each sweep, of the keys ``SWEEP_KEYS``.
        claims: in the order of the report; none: its sweeps are all there is.
        limit: documents by task; the tasks are its keys. For the embedded model only: every other
            model is scored on all documents unless --limit says otherwise.
        findings: yields what its committed run shows, one paragraph of Markdown after another with
            line breaks at will, and quotes numbers from the ``Numbers`` that it is given. None:
            nothing is said.
    """

    name: str
    title: str
    sweeps: tuple[dict[str, Any], ...]
    claims: tuple[Claim, ...]
    limit: dict[str, int | None]
    findings: Callable[[Numbers], Iterator[str]] | None = None

    def __post_init__(self) -> None:
        for sweep in self.sweeps:
            if not sweep.keys() <= SWEEP_KEYS:
                wrong = ", ".join(sorted(sweep.keys() - SWEEP_KEYS))
                raise ValueError(f"study {self.name}: its sweeps must not differ in {wrong}")

    def settings(self, flags: dict[str, Any]) -> list[Settings]:
        """The settings of each sweep; ``flags`` are what the command line adds or overrides.

        Raises:
            UserError: a value that is not what its setting takes.
        """
        model = flags.get("model", EMBEDDED)
        check_path("model", model)
        folder = f"study-{self.name}" + ("" if model == EMBEDDED else f"-{slug(model)}")
        shared: dict[str, Any] = {
            "tasks": list(self.limit),
            "timing": "off",
            "output_path": Path("runs") / folder,
        }
        if model == EMBEDDED:
            shared["limit"] = {OTHERS: None} | self.limit
        return [settings(shared | sweep | flags) for sweep in self.sweeps]


def studies() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed study; nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP))}


def load_study(name: str) -> Study:
    """The study of that name. Raises UserError, with the names that there are, if none is."""
    found = studies()
    if name not in found:
        raise UserError(f"unknown study {name!r}; there are {', '.join(found) or 'none installed'}")
    loaded: Study = found[name].load()
    return loaded
