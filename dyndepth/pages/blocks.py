"""The generated parts of the pages: by name, a function from results and options to Markdown.

A page asks for one with ``<!-- generated: NAME`` and options in YAML (folder, task, method labels:
what is shown is the page's choice); everything between that and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import DENSE
from dyndepth.cells.identity import LEADING
from dyndepth.cells.naming import label, remark
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.common.provenance import VERSIONS
from dyndepth.pages.markdown import joined, table
from dyndepth.results.columns import LEADERBOARD
from dyndepth.results.noise import told
from dyndepth.results.numbers import Numbers, Record, number, read, spread
from dyndepth.results.seeds import together

Options = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the numbers lie: the repository's ``root``, and the committed main run ``results``,
    relative to it."""

    root: Path
    results: Path

    def rows(self, folder: str | Path, name: str) -> list[Record]:
        """The rows of a table; empty if the file is not there."""
        path = self.root / folder / name
        return read(path) if path.is_file() else []

    def missing(self) -> str:
        """What stands where the main run's numbers would."""
        return (
            f"No run is committed in `{self.results}/` yet. "
            f"`python -m dyndepth.sweep --output_path {self.results}` with the methods to compare "
            "makes one, `make docs` writes its numbers here."
        )


def methods(source: Source, options: Options) -> str:
    """The methods: name, rule, what decides, source. Option ``cards``: where the cards lie."""
    from dyndepth.pages.cards import kind, summary, training

    folder = options.get("cards", ".")
    lines = []
    for cls in sorted(method_classes(), key=lambda cls: (_KINDS.index(kind(cls)), cls.name)):
        what = "" if kind(cls) == "method" else f"{kind(cls)}: "
        trains = f", {training(cls)}" if training(cls) else ""
        paper = "" if cls.paper == "control" else cls.paper
        name = f"[`{cls.name}`]({folder}/{cls.name}.md)"
        lines.append((name, what + summary(cls), f"{cls.granularity}{trains}", paper))
    return table(("method", "rule", "decides", "source"), lines)


_KINDS = ("method", "lossless", "control", "bound")


def method_classes() -> list[Any]:
    """The classes of the methods that come with the suite, sorted by name."""
    from dyndepth.common import digests, registry

    own = f"{digests.METHODS}."
    found = registry.methods()
    return [registry.method_class(name) for name in found if found[name].value.startswith(own)]


def run(source: Source, options: Options) -> str:
    """What the main run is: cells, methods, budgets, documents, machine, versions."""
    rows = source.rows(source.results, "leaderboard.csv")
    if not rows:
        return source.missing()
    failed = sum(row["status"] != "done" for row in rows)
    targets = sorted({float(row["target_speedup"]) for row in rows} - {1.0})

    def all_of(key: str, empty: str = "") -> str:
        return joined(row[key] or empty for row in rows)

    versions = [all_of(key).replace("==", " ") for key in VERSIONS]
    machines = joined(filter(None, (row["device_name"] for row in rows)))
    return (
        f"`{source.results}/`: {len(rows)} cells ({failed} failed) of "
        f"{len({row['method'] for row in rows})} methods on {all_of('model')}, "
        f"target speedups {joined(f'{target:g}' for target in targets)}, seeds "
        f"{all_of('seed')}. Documents: {all_of('limit', 'all')}. {all_of('dtype')} on "
        f"{machines or 'an unnamed processor'}; {', '.join(versions)}; commit "
        f"{all_of('git_commit', 'unknown')}."
    )


def leaderboard(source: Source, options: Options) -> str:
    """Rows of the main run's leaderboard at one target: dense, then by bits per byte, then bounds;
    nothing of what is lossless, which saves no FLOPs.

    Options: ``target``; ``phases`` (default: both); ``recovered`` (default: false). Seeds are
    averaged; an interval then reaches from the lowest end of any seed's to the highest.
    """
    from dyndepth.pages.cards import wall, with_legend

    target, phases = float(options.get("target", 1.5)), options.get("phases", "both")
    rows = source.rows(source.results, "leaderboard.csv")
    if not rows:
        return source.missing()
    chosen: dict[str, list[Record]] = {}
    for row in rows:
        fits = row["method"] == DENSE or float(row["target_speedup"]) == target
        fits = fits and (row["phases"] == phases or row["method"] == DENSE)
        fits = fits and row.get("lossless") != "TRUE"
        plain = row["recovery"] == NONE
        if fits and row["status"] == "done" and (plain or options.get("recovered")):
            chosen.setdefault(label(row), []).append(row)
    seeds = {name: len(group) for name, group in chosen.items()}
    shown = {name: averaged(group) for name, group in chosen.items()}

    def place(name: str) -> tuple[bool, bool, float]:
        row = shown[name]
        return row["bound"] == "TRUE", name != DENSE, float(row["bits_per_byte"] or "inf")

    lines = []
    for name in sorted(shown, key=place):
        row = shown[name]
        lines.append(
            (
                _named(name, row) + (" (bound)" if row["bound"] == "TRUE" else ""),
                str(seeds[name]),
                spread(row, "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"),
                spread(row, "mean_acc", "mean_acc_low", "mean_acc_high"),
                number(row["block_speedup"], "{:.2f}x"),
                number(row["total_speedup"], "{:.2f}x"),
                wall(row, "prefill"),
                wall(row, "decode"),
            )
        )
    headings = ("method", "seeds", "bits per byte", "mean accuracy", "block FLOPs", "total FLOPs")
    found = table((*headings, "prefill", "decode"), lines)
    return with_legend(found, [text for line in lines for text in line[6:8]])


def _named(name: str, row: Record) -> str:
    """A row's name as code, and what its method says beside it."""
    said = remark(row)
    return f"`{name}`" + (f" ({said})" if said else "")


def averaged(group: Sequence[Record]) -> Record:
    """One row from those of several seeds, by ``seeds.together``; a single one as it stands."""
    if len(group) == 1:
        return dict(group[0])
    found = together([{key: _value(key, text) for key, text in row.items()} for row in group])
    return {key: _text(value) for key, value in found.items()}


def _value(key: str, text: str) -> Any:
    """What a field of leaderboard.csv says, a number where that is one; None of an empty one."""
    column = LEADERBOARD.columns.get(key)
    if key in LEADING or column is None or not text:
        return text or None
    return {"number": float, "integer": int}.get(column.dtype, str)(text)


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def equal_flops(source: Source, options: Options) -> str:
    """The main run's methods at equal achieved FLOPs: a row per method, a column per budget.

    Options: ``task``, ``metric``; ``flops``: ``block`` (default) or ``total``; ``phases`` (default:
    both); ``recovered`` (default: false).
    """
    rows = source.rows(source.results, "equal_flops.csv")
    if not rows:
        return source.missing()
    found: dict[tuple[bool, str], dict[float, Record]] = {}
    for row in rows:
        fits = all(row[key] == options[key] for key in ("task", "metric"))
        fits = fits and row["flops"] == options.get("flops", "block")
        fits = fits and row["phases"] == options.get("phases", "both") and row["value"] != ""
        if fits and (row["recovery"] == NONE or options.get("recovered")):
            own = found.setdefault((row["bound"] == "TRUE", label(row)), {})
            own[float(row["reference_speedup"])] = row
    budgets = sorted({budget for own in found.values() for budget in own})
    best = options.get("sort", budgets[len(budgets) // 2] if budgets else 1.0)

    def place(item: tuple[tuple[bool, str], dict[float, Record]]) -> tuple[bool, bool, float]:
        (bound, _), own = item
        row = own.get(best)
        sign = -1 if row and row["higher_is_better"] == "TRUE" else 1
        return bound, row is None, sign * float(row["value"]) if row else 0.0

    lines = [
        (
            _named(name, next(iter(own.values()))) + (" (bound)" if bound else ""),
            *(spread(own.get(budget, {}), "value", "low", "high") for budget in budgets),
        )
        for (bound, name), own in sorted(found.items(), key=place)
    ]
    return table(("method", *(f"{budget:g}x" for budget in budgets)), lines)


def study(source: Source, options: Options) -> str:
    """A study's comparisons of one method on one metric: a row a target, a column an opponent.

    Options: ``folder``, ``task``, ``metric``; ``columns``: heading -> label in claims.csv, of A or
    of B; values of B are those at A's executed FLOPs. ``dense`` first: dense's, from the
    leaderboard.
    """
    columns: dict[str, str] = options["columns"]
    claims = [
        row
        for row in source.rows(options["folder"], "claims.csv")
        if row["task"] == options["task"] and row["metric"] == options["metric"]
    ]
    cells: dict[float, dict[str, str]] = {}
    for row in claims:
        own = cells.setdefault(float(row["target_speedup"]), {})
        own |= {row["a"]: row["value_a"], row["b"]: row["value_b"]}
    for heading, name in columns.items():
        if not any(name in own for own in cells.values()):
            raise UserError(f"{options['folder']}/claims.csv compares no {name!r} ({heading})")
    lines = [
        (f"{target:g}x", *(number(own.get(name)) for name in columns.values()))
        for target, own in sorted(cells.items())
    ]
    return table(("target", *columns), lines)


def dense(source: Source, options: Options) -> str:
    """A study's dense model, in one sentence. Option ``folder``."""
    for row in source.rows(options["folder"], "leaderboard.csv"):
        if row["method"] == DENSE and row["recovery"] == NONE:
            return (
                f"Dense has {number(row['bits_per_byte'])} bits per byte and a mean accuracy of "
                f"{spread(row, 'mean_acc', 'mean_acc_low', 'mean_acc_high')}."
            )
    raise UserError(f"{options['folder']}/leaderboard.csv has no dense row")


def verdicts(source: Source, options: Options) -> str:
    """A study's claims with their source and how often they were borne out. Option ``folder``."""
    from dyndepth.studies.report import tally
    from dyndepth.studies.study import load_study

    rows = source.rows(options["folder"], "claims.csv")
    if not rows:
        raise UserError(f"{options['folder']}/claims.csv has no rows; the study makes them")
    texts = {claim.name: claim.text for claim in load_study(rows[0]["study"]).claims}
    lines = []
    for name in dict.fromkeys(row["claim"] for row in rows):
        own = [row for row in rows if row["claim"] == name]
        said = own[0]["published"]
        lines.append((name, texts.get(name, ""), own[0]["source"], said, tally(own)))
    headings = ("claim", "what it says", "source", "published", "comparisons here")
    return table(headings, lines)


def routes(source: Source, options: Options) -> str:
    """What scoring many plans together saves, from the last line of the bench. Option ``file``."""
    path = source.root / options["file"]
    if not path.is_file():
        return f"No measurement of it is committed in `{options['file']}` yet."
    try:
        lines = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["routes"]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} does not end in the JSON line of the bench's routes") from None
    return "\n".join(
        f"- `{name}`: {line['ratio']:.2f} [{line['low']:.2f}, {line['high']:.2f}] of the time that "
        f"the plans take one by one; {line['computed']:.2f} of their sublayers are left to compute."
        for name, line in lines.items()
    )


def bench(source: Source, options: Options) -> str:
    """Lines of the bench's part ``shapes``. Options: ``file``, which ``--output_path`` wrote;
    ``works``: what each is called here."""
    path = source.root / options["file"]
    if not path.is_file():
        return f"No measurement of it is committed in `{options['file']}` yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for name, line in found["bench"].items():
        work, phase, dtype = name.split("/")[:3]
        kind, shape = phase.split("_", 1)
        called = options["works"].get(work, work)
        ideal = f"{line['flop_ideal']:.2f}x"
        speed = told(line["speedup"], line["low"], line["high"], line["suspect"])
        lines.append((called, f"{kind} of {shape}, {dtype}", speed, ideal))
    about = found["about"]
    return (
        table(("keys of skipped tokens", "tokens", "faster than dense", "FLOPs allow"), lines)
        + f"\n\n{about['device_name']}, {about['threads']} threads, {about['repeats']} rounds."
    )


def dense_by_run(source: Source, options: Options) -> str:
    """Dense's bits per byte in each of several runs. Option ``folders``: of the runs."""
    if not (source.root / source.results / "leaderboard.csv").is_file():
        return source.missing()
    numbers = Numbers(source.root, source.results)
    found = []
    for folder in options["folders"]:
        bits = numbers.within(folder).of("leaderboard", "bits_per_byte", label=DENSE)
        found.append(f"{bits} in `{Path(folder).name}/`")
    return f"- Bits per byte of dense: {', '.join(found)}."


def findings(source: Source, options: Options) -> str:
    """What a study shows, an item a sentence, as the study itself says it. Option ``study``."""
    from dyndepth.studies.study import load_study

    study = load_study(options["study"])
    if study.findings is None:
        raise UserError(f"the study {study.name!r} has no findings")
    if not (source.root / source.results / "leaderboard.csv").is_file():
        return source.missing()
    said = study.findings(Numbers(source.root, source.results))
    return "\n".join(f"- {' '.join(text.split())}" for text in said)


BLOCKS: dict[str, Callable[[Source, Options], str]] = {
    "methods": methods,
    "run": run,
    "leaderboard": leaderboard,
    "equal_flops": equal_flops,
    "study": study,
    "dense": dense,
    "verdicts": verdicts,
    "routes": routes,
    "bench": bench,
    "dense_by_run": dense_by_run,
    "findings": findings,
}
"""Name in a page's marker -> what writes the block."""
