"""What a dry run prints: the cells and the tasks, the time, the memory, and what was assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyndepth.common import commands
from dyndepth.common.printing import Column, narrow, print_columns
from dyndepth.sweep.estimate import costs
from dyndepth.sweep.estimate.machines import GIB
from dyndepth.sweep.estimate.passes import ACCEPTED, DRAFTED, WRITTEN
from dyndepth.sweep.estimate.plan import Estimate, Planned, estimate
from dyndepth.sweep.estimate.texts import TOKENS_A_WORD, UNKNOWN, Text

if TYPE_CHECKING:
    from dyndepth.sweep.grid import Grid
    from dyndepth.sweep.settings import Settings

SINGLE = 24
"""Cells up to which each has a row of its own."""
TABLES = 3e3
"""Bytes that a scored document leaves in a cell and in the tables, about."""


def print_estimate(settings: Settings, found: Grid) -> None:
    """Print what the sweep will cost.

    Raises:
        UserError: as ``plan.estimate``.
    """
    from dyndepth.models.loading import longest_window

    model = (settings.model, settings.revision, settings.trust_remote_code)
    whole = estimate(settings, found, longest_window(*model))
    _print_tasks(whole.texts)
    if whole.left:
        _print_cells(whole, settings.phases)
    for line in which(whole, settings):
        say(line)
    if not whole.left:
        return
    _print_time(whole)
    say(memory_line(whole, settings))
    scored = sum(each.todo == "everything" for each in whole.cells)
    documents = sum(text.documents for text in whole.texts) * scored
    weights = f" and the weights, {_gib(whole.need.weights)}" if whole.start is None else ""
    say(f"disk: about {size(documents * TABLES)} of cells and tables{weights}")
    for line in assumptions(whole, settings):
        say(f"assumed: {line}")


def which(whole: Estimate, settings: Settings) -> list[str]:
    """Which cells these are, where they are a shard's, or some are there already."""
    number, count = settings.shard
    several, left = len(whole.cells), len(whole.left)
    lines = []
    if count > 1:
        lines.append(f"shard {number} of {count}: its {_many(several, 'cell')} alone")
    if not left:
        place = f"are there already in {settings.output_path}"
        lines.append(f"all {_many(several, 'cell')} {place}: nothing is left to compute")
    elif left < several:
        lines.append(f"{several - left} of {_many(several, 'cell')} are there already")
    timed = sum(each.todo == "timing" for each in whole.cells)
    if timed:
        lines.append(f"{timed} of {_many(several, 'cell')} {_be(timed)} scored, and left to time")
    return lines


def say(line: str) -> None:
    """Print a line, at a terminal broken between words."""
    from rich.text import Text as Plain

    to = commands.console()
    to.print(Plain(line), soft_wrap=not to.is_terminal)


def _print_tasks(texts: Sequence[Text]) -> None:
    together: dict[str, list[Text]] = {}
    for text in texts:
        together.setdefault(text.asked, []).append(text)
    named, documents, tokens, known = [], [], [], []
    for asked, members in together.items():
        group = len(members) > 1 or members[0].task != asked
        named.append(f"{asked} ({_many(len(members), 'task')})" if group else asked)
        count = sum(text.documents for text in members)
        total = sum(text.tokens for text in members)
        documents.append(f"{count:,}")
        tokens.append(f"{total / max(1, count):,.0f}")
        known.append(", ".join(dict.fromkeys(_KNOWN[text.counted] for text in members)))
    columns = [
        Column("task", named, name=True),
        Column("documents", documents),
        Column("tokens each", tokens),
        Column("known from", known),
    ]
    print_columns(columns, "What is scored", "tokens: prompt, choices or what is written")


_KNOWN = {
    "data": "the data",
    "sample": "a sample of the data",
    "assumed": "the data's card, words assumed",
    "unknown": "nothing: assumed",
}


WIDE = 110
"""Columns of a terminal from which on every part has one."""


def _print_cells(whole: Estimate, phases: str) -> None:
    cells = whole.cells
    rows = [[one] for one in cells] if len(cells) <= SINGLE else _grouped(cells)
    title = "Cells of this sweep (dry run: nothing was written)"
    timed = any(one.timing.seconds for one in cells)
    parts = ["scoring", "fitting", "timing"] if timed else ["scoring", "fitting"]
    seeds = len({one.cell.seed for one in cells}) > 1
    columns = [
        Column("cell", [_named(row, phases, seeds) for row in rows], name=True),
        Column("fit", [_joined(one.fit for one in row) for row in rows]),
        Column("TFLOPs", [_flops(sum(one.flops for one in row)) for row in rows]),
        *(
            Column(part, [duration(sum(getattr(one, part).seconds for one in row)) for row in rows])
            for part in parts
        ),
        Column("all", [duration(sum(one.seconds for one in row)) for row in rows]),
    ]
    caption = f"where a method has the choice, it skips in phases={phases}"
    if narrow(WIDE):
        # Names come first; the sums of the parts stand below.
        kept = [one for one in columns if one.heading in ("cell", "fit", "fitting", "all")]
        gone = [one.heading for one in columns if one not in kept]
        columns, caption = kept, f"{caption}; left out at this width: {', '.join(gone)}"
    print_columns(columns, title, caption)


def _grouped(cells: Sequence[Planned]) -> list[list[Planned]]:
    """By method, parameters and recovery."""
    found: dict[str, list[Planned]] = {}
    for one in cells:
        key = repr((one.cell.method, sorted(one.cell.parameters.items()), one.cell.recovery))
        found.setdefault(key, []).append(one)
    return list(found.values())


def _named(row: Sequence[Planned], phases: str, seeds: bool) -> str:
    first = row[0].cell.describe().replace(f"phases={phases}", "")
    first = first.replace(", )", ")").replace("()", "").replace("(, ", "(")
    if not seeds:
        first = first.replace(f", seed {row[0].cell.seed}", "")
    if len(row) == 1:
        return first
    before, _, after = first.partition(" at ")
    recovery = after.partition(", ")[2].partition("seed")[0] if not seeds else ""
    return f"{before}{f', {recovery}' if recovery else ''}: {_many(len(row), 'cell')}"


def _joined(words: object) -> str:
    return "/".join(dict.fromkeys(words)).replace("none", "-")  # type: ignore[call-overload]


def _print_time(whole: Estimate) -> None:
    parts = {
        part: sum(getattr(one, part).seconds for one in whole.cells)
        for part in ("scoring", "fitting", "timing")
    }
    said = ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items() if seconds)
    if whole.workers.count > 1:
        said += f"; scored and fitted by {whole.workers.count} workers at once"
    say(f"about {duration(whole.seconds)} in all on {whole.machine.what}: {said}")
    if whole.start is not None:
        say(f"before that the model is loaded, which took {duration(whole.start)} here")


def memory_line(whole: Estimate, settings: Settings) -> str:
    """What is needed of the memory, whether that fits, and what helps if not."""
    need, have = whole.need, whole.machine.memory
    said = f"memory: {_gib(need.weights)} of weights, {_gib(need.scoring)} beside them in scoring"
    if need.training:
        said += f", {_gib(need.training)} in training"
    sharing = whole.workers.sharing
    several = f", {sharing} times over, for each worker holds the model" if sharing > 1 else ""
    said += f"{several}: {_gib(sharing * need.most)} in all"
    if have is None:
        return said
    have, full = have / sharing, have
    if need.most <= 0.95 * have:
        return f"{said}; fits into {_gib(full)}"
    remedies = ["fewer --workers"] if sharing > 1 and need.most <= 0.95 * full else []
    if settings.dtype == "float32":
        remedies.append("--dtype bfloat16")
    if need.weights + need.training <= 0.95 * have:
        remedies.append(f"a smaller --batch_size than {settings.batch_size}")
    if whole.machine.kind == "cuda":
        remedies.append("--device spread over several GPUs")
    remedies.append("a smaller model")
    return f"{said}; does not fit into {_gib(full)}: take {', or '.join(remedies)}"


def assumptions(whole: Estimate, settings: Settings) -> list[str]:
    """A line for each thing that was not known."""
    from dyndepth.models.shapes import is_shape

    lines = list(whole.machine.said)
    if is_shape(settings.model):
        lines.append("a shape has no tokenizer: tokens are those of the embedded model's")
        if settings.apply_chat_template:
            lines.append("nor has it a chat template: prompts are counted as plain text")
    kinds = {text.counted for text in whole.texts}
    if "sample" in kinds:
        lines.append("of tasks with many documents a drawn sample stands for all")
    if kinds & {"assumed", "unknown"}:
        lines.append(
            f"words of a document and {TOKENS_A_WORD:g} tokens a word where its data is not in the "
            "cache of data sets"
        )
    if "unknown" in kinds:
        lines.append(f"{UNKNOWN['documents']:,} documents of a task that nothing is known of")
    lines.append(f"{costs.CELL:g} s a cell for requests, metrics and tables")
    if any(text.prompts for text in whole.texts):
        lines.append(f"texts end after {WRITTEN:.0%} of a task's limit")
    if any(one.cell.build().speculates for one in whole.cells):
        lines.append(
            f"drafts have {DRAFTED} tokens, of which each stands in {ACCEPTED:.0%} of cases where "
            "those before it do; their target is that of the draft alone"
        )
    if any(one.timing.seconds for one in whole.cells):
        lines.append(f"at most {costs.PAIRS} pairs of a timed shape, none beyond its time")
        if settings.compiled_dense:
            lines.append(
                "compiled dense runs as fast as dense; the time of compiling itself is not counted"
            )
    if whole.workers.said:
        lines.append(whole.workers.said)
    if whole.tried:
        lines.append(f"trying a plan of a bound takes {costs.TRIED:.0%} of a dense pass")
    if any(one.fit == "trains" for one in whole.cells):
        lines.append(f"training at the rate of {settings.dtype}, whatever it is cast to")
    if whole.start is None:
        lines.append("no fit is in the cache yet")
    return lines


def duration(seconds: float) -> str:
    """Seconds for people: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    if seconds < 0.5:
        return "0 s" if seconds < 0.05 else f"{seconds:.1f} s"
    for most, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < most:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def _flops(flops: float) -> str:
    tera = flops / 1e12
    return f"{tera:,.0f}" if tera >= 10 else f"{tera:.2g}"


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
