"""The command line ``python -m dyndepth.routes``: records routing traces.

With ``--methods`` it records them on some documents; with a sweep's output folder every cell of
that run, rebuilt from its identity, into ``RUN/routes/<cell>.safetensors``. ``--plot`` draws what
was recorded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import DENSE, method_identity
from dyndepth.cells.identity import cell_hash
from dyndepth.cells.store import Store
from dyndepth.common.commands import HELP, Parser, run, worded
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_folder, path_of
from dyndepth.routes.own_text import legend, own_texts, shaded, usable_shades
from dyndepth.routes.recorded import Loaded, Recording, passages_of
from dyndepth.sweep.grid import plans
from dyndepth.sweep.rerun import check_given, revision_of
from dyndepth.sweep.settings import Settings, settings

LISTS = ("methods", "speedups", "seed")
FREE = (*LISTS, "model", "phases", "dtype", "attn_implementation", "revision", "output_path")
"""Flags that a recorded run decides by itself."""
TEXTS = {
    "methods": HELP["methods"].replace("compare", "record"),
    "output_path": "folder for the recorded files and pictures (default: routes; RUN/routes)",
}
OUTPUT = "routes"
PICTURES = (".png", ".svg", ".pdf")
WHOLE = "drafts are not recorded, only the whole model, which verifies them: every block runs"
LENGTH = 256
"""Tokens of an evaluation passage that are recorded; of one's own text all that the model takes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if a cell could not be recorded, 2 for wrong input."""
    return run("routes", _routes, arguments, "interrupted; what was recorded is kept")


def _parser() -> Parser:
    built = Parser(
        "routes",
        "Record which sublayers each token executes, by method or by a sweep's cell.",
        "Without RUN, flags that are not given are as a sweep has them.",
    )
    add = built.add_argument
    add("run", nargs="?", metavar="RUN", help=f"{HELP['run']}: record its cells again")
    for name in FREE:
        text = worded(name, TEXTS.get(name, ""))
        add(f"--{name}", nargs="+" if name in LISTS else None, metavar=name.upper(), help=text)
    add("--corpus", help=f"{HELP['corpus']} (default: embedded)")
    add("--device", help=f"{HELP['device']} (default: auto)")
    add("--trust_remote_code", action="store_true", help=HELP["trust_remote_code"])
    built.whole("limit", 1, "evaluation passages to record", 8)
    built.whole(
        "length",
        1,
        f"tokens; longer documents are cut (default: {LENGTH}; of one's own text all that the "
        "model takes)",
    )
    built.whole(
        "prompt_length",
        0,
        "tokens of each document that count as prompt; the rest is generation, as when passages "
        "are scored",
        1,
    )
    add(
        "--text",
        metavar="FILE",
        help="text file to record, an empty line between documents; - for standard input",
    )
    add("--prompt", metavar="WORDS", help="words to record in place of a file")
    built.whole("generate", 1, "tokens that the method writes after each text, recorded as well")
    add(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw each text's route: tokens across, blocks upwards; as PNG, SVG or PDF by the "
        "file's ending (default: a PNG beside each record)",
    )
    return built


def _routes(given: list[str]) -> int:
    """Record; the last line printed is one JSON document."""
    options = vars(_parser().parse_args(given))
    started = time.monotonic()
    _check_plot(options)
    jobs, output = _cells(options) if options["run"] else _methods(options)
    texts, own = _texts(options)
    print(f"{len(jobs)} to record on {len(texts)} documents", flush=True)
    recorded = failed = 0
    drawn: list[tuple[Any, str, str]] = []
    loaded = Loaded(options)
    for index, job in enumerate(jobs, start=1):
        where = f"[{index}/{len(jobs)}] {job.label}"
        print(f"{where}: recording ({time.monotonic() - started:.0f} s)", flush=True)
        if job.speculates:
            print(f"{where}: {WHOLE}", flush=True)
        try:
            routes = job.record(loaded, texts, options)
            routes.save(output / f"{job.file}.safetensors")
            recorded += 1
            shown = list(texts) if own else list(texts)[:1]
            if own:
                _tell(routes, shown, texts, loaded, index == 1)
            drawn += [(routes, document, job.file) for document in shown]
        except UserError as fault:
            if not options["run"]:
                raise
            failed += 1
            print(f"{where}: failed: {fault}", file=sys.stderr, flush=True)
    summary = {
        "output_path": str(output),
        "recorded": recorded,
        "failed": failed,
        "seconds": round(time.monotonic() - started, 1),
    }
    if options["plot"] is not None:
        summary["plots"] = _draw(drawn, output, options["plot"])
    print(json.dumps({"routes": summary}), flush=True)
    return 1 if failed else 0


def _check_plot(options: dict[str, Any]) -> None:
    """Raises UserError for a picture that could not be written, before anything is computed."""
    file = options["plot"]
    if file and path_of(file).suffix.lower() not in PICTURES:
        raise UserError(f"--plot takes a file that ends in {', '.join(PICTURES)}, not {file!r}")
    if file:
        check_folder("plot", path_of(file).parent)


def _texts(options: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """What is recorded, and whether it is a text of one's own; what is left out of it is told."""
    count = options["limit"]
    if options["text"] is None and options["prompt"] is None:
        options["length"] = options["length"] or LENGTH
        return passages_of(count), False
    found = own_texts(options["text"], options["prompt"])
    if len(found) > count:
        print(
            f"the text has {len(found)} documents, with an empty line between them; the first "
            f"{count} are recorded (--limit)",
            file=sys.stderr,
        )
    return dict(list(found.items())[:count]), True


def _tell(
    routes: Any, documents: list[str], texts: dict[str, str], loaded: Loaded, first: bool
) -> None:
    """Print the route of each document; with the ``first`` record what was cut of it, and what the
    marks mean."""
    shades = usable_shades(sys.stdout.encoding)
    for document in documents:
        whole = len(loaded.tokenizer([texts[document]], verbose=False)["input_ids"][0])
        rows = routes.document(document)
        if first and whole > rows.stop - rows.start:
            print(
                f"{document} has {whole} tokens; the first {rows.stop - rows.start} are recorded",
                file=sys.stderr,
            )
        print("\n".join(shaded(routes, document, shades)), flush=True)
    if first:
        print(legend(routes.gates.shape[1], shades), flush=True)


def _draw(drawn: list[tuple[Any, str, str]], output: Path, file: str) -> list[str]:
    """Draw each (routes, document, name of its record), and return the pictures' paths: ``file`` if
    there is one, which is numbered if there are several, or beside the records."""
    from dyndepth.plots.texts import text_route

    single = len({document for _, document, _ in drawn}) == 1
    found = []
    for number, (routes, document, name) in enumerate(drawn):
        place = "" if single else f"-{document.rpartition('/')[2]}"
        path = output / f"{name}{place}.png"
        if file:
            named = path_of(file)
            path = named.with_stem(f"{named.stem}-{number}") if len(drawn) > 1 else named
        text_route(routes, document, path)
        print(f"written: {path}", flush=True)
        found.append(str(path))
    return found


def _methods(options: dict[str, Any]) -> tuple[list[Recording], Path]:
    """Jobs of ``--methods``, and where they go."""
    from dyndepth.common.registry import parse_methods
    from dyndepth.models.loading import layer_count, longest_window

    if not options["methods"]:
        raise UserError("nothing to record: give --methods, or a sweep's output folder")
    chosen = _settings(options | {"output_path": options["output_path"] or OUTPUT}, FREE)
    model = (chosen.model, chosen.revision, chosen.trust_remote_code)
    named = {name for name, _ in parse_methods(chosen.methods)}
    jobs = []
    for plan in plans(chosen, layer_count(*model), longest_window(*model)):
        if plan.method == DENSE and DENSE not in named:
            continue
        name = f"{plan.method}-x{plan.target_speedup:g}-seed{plan.seed}"
        file = f"{name}-{cell_hash(method_identity(plan.build(), plan.recovery))}"
        jobs.append(Recording(plan.describe(), file, chosen, plan=plan))
    return jobs, chosen.output_path


def _cells(options: dict[str, Any]) -> tuple[list[Recording], Path]:
    """Jobs of a sweep's cells, and where they go; what can't be recorded is told and left out."""
    given = [f"--{name}" for name in FREE if options[name] is not None]
    if given:
        raise UserError(f"{given[0]} can't be given with a run's folder, which decides it")
    folder = path_of(options["run"])
    cells = Store(folder).all()
    if not cells:
        raise UserError(f"{options['run']} holds no cells; give the --output_path of a sweep")
    jobs = []
    for cell in cells:
        identity = cell.identity
        label = (
            f"{identity['method']} at {identity['target_speedup']:g}x, "
            f"seed {identity['seed']}, cell {cell.key}"
        )
        if cell.status != "done":
            print(f"{label}: left out, for it failed", file=sys.stderr)
        else:
            check_given(identity, options, ["corpus"])
            of_cell = {
                "model": identity["model"],
                "dtype": identity["dtype"],
                "attn_implementation": identity["attn_implementation"],
                "revision": revision_of(identity) or None,
            }
            wanted = _settings(options | of_cell, tuple(of_cell))
            jobs.append(Recording(label, cell.key, wanted, identity=identity))
    return jobs, folder / "routes"


def _settings(options: dict[str, Any], names: Sequence[str]) -> Settings:
    """Checked settings from some of the options, and those that both ways of calling share."""
    names = (*names, "corpus", "device", "trust_remote_code")
    return settings({name: options[name] for name in names if options[name] is not None})


if __name__ == "__main__":
    sys.exit(main())
