"""The command line ``python -m dyndepth.export``: a method's model as files that others load.

``dyndepth.export.write`` says what becomes of which method; ``--check`` looks at an export again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.common.commands import CHOICES, HELP, PIPE_WIDTH, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED, check_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if an export is not what it should be, 2 for wrong input, 130
    after Ctrl-C."""
    return run("export", _export, arguments, "interrupted; nothing was exported")


def _parser() -> Parser:
    built = Parser(
        "export",
        "Write a method's model as a checkpoint that others load.",
        "Whole blocks that are left out for every token, and recovery adapters, become a plain "
        "checkpoint; any other method a folder for load_method. docs/export.md says more.",
    )
    add = built.add_argument
    add("method", nargs="?", metavar="METHOD", help="as --methods takes it")
    add("--methods", help=HELP["methods"].replace("methods to compare", "the one method to export"))
    add("--speedups", default="1.25", help=f"{HELP['speedups']}; here one (default: 1.25)")
    built.shared("phases", "both", choices=CHOICES["phases"])
    add("--recovery", default="none", help='"lora(rank=8, steps=100)", joint, ... (default: none)')
    built.model(spread=False)
    built.shared("corpus", EMBEDDED)
    built.whole("seed", 0, "of everything random", 0)
    add(
        "--output_path",
        metavar="FOLDER",
        help="for the export; an older one is replaced if untouched",
    )
    add("--check", metavar="FOLDER", help="check the export in FOLDER again, export nothing")
    return built


def _export(given: list[str]) -> None:
    """Export or check; the last line printed is one JSON document."""
    options = vars(_parser().parse_args(given))
    if options["check"] is not None:
        _check(options)
        return
    spec = _spec(options)
    if options["output_path"] is None:
        raise UserError("--output_path is missing; name a folder for the export")
    folder = check_folder("output_path", Path(options["output_path"]))
    folder = folder.absolute()
    from dyndepth.export.record import check_replaceable
    from dyndepth.models.loading import layer_count, longest_window, named, one_device
    from dyndepth.sweep.grid import plans
    from dyndepth.sweep.settings import settings

    check_replaceable(folder)
    chosen = settings(
        {
            "methods": spec,
            "speedups": options["speedups"],
            "phases": options["phases"],
            "recovery": options["recovery"],
            "seed": options["seed"],
        }
    )
    plan = _plan(chosen, spec, layer_count(*named(options)), longest_window(*named(options)), plans)
    options["device"] = one_device(options["device"], "export")

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.export.write import export
    from dyndepth.fitting.recovery.kept import fit_and_recover
    from dyndepth.models.loading import load_tokenizer, loaded

    steady_allocator()
    tokenizer = load_tokenizer(*named(options))
    corpus = load_corpus(options["corpus"], tokenizer)
    model = loaded(options)
    method, adapter = fit_and_recover(plan.build(), model, corpus, plan.recovery)
    print(f"exporting {spec}, target speedup {method.target_speedup:g}x", flush=True)
    command = f"python -m dyndepth.export {shlex.join(given)}"
    record = export(model, tokenizer, method, corpus, folder, adapter, command=command)
    _say(record, folder)


def _spec(options: dict[str, Any]) -> str:
    """The one method that is to be exported."""
    from dyndepth.common.registry import parse_methods

    given = [each for each in (options["method"], options["methods"]) if each is not None]
    if len(given) != 1 or len(parse_methods(given[0])) != 1:
        raise UserError("export takes one method, as in `dyndepth export dense`; give one")
    return str(given[0])


def _plan(chosen: Any, spec: str, layers: int, longest: int | None, plans: Any) -> Any:
    """The one cell of ``chosen`` that is of the method named, not of the yardstick beside it."""
    from dyndepth.common.registry import parse_methods

    [(name, _)] = parse_methods(spec)
    for flag in ("speedups", "recovery"):
        if len(getattr(chosen, flag)) != 1:
            raise UserError(f"--{flag} takes one value, for there is one export; give one")
    found = [plan for plan in plans(chosen, layers, longest) if plan.method == name]
    if not found:
        raise UserError(
            f"{name} trains nothing, so --recovery {chosen.recovery[0]} is none; use lora"
        )
    return found[-1]


def _say(record: dict[str, Any], folder: Path) -> None:
    """Print what became of it, in lines that fit the terminal, and the line of JSON."""
    found, agreed, job = record["measured"], record["agreement"], record["job"]
    if record["kind"] == "checkpoint":
        said = [f"a plain checkpoint of {len(record['kept'])} of {record['blocks']} blocks"]
    else:
        said = [f"a folder for load_method, no plain checkpoint: {record['reason']}"]
    if record["kind"] == "checkpoint" and record["irregular"]:
        named = " and ".join(record["irregular"])
        said.append(f"{named}: other programs must read it from config.json, not from a pattern")
    said.append(
        f"read back in another process: logits differ by at most {agreed['logits']:.1e}, "
        f"{agreed['tolerance']:.1e} is tolerated; {agreed['tokens']} of "
        f"{len(job['windows']) * job['steps']} greedy tokens are equal"
    )
    said.append(
        f"achieved speedup {found['block_flops_speedup']:.2f}x in block FLOPs, "
        f"{found['total_flops_speedup']:.2f}x in all"
    )
    for line in said:
        print(
            textwrap.fill(line, min(PIPE_WIDTH, shutil.get_terminal_size((PIPE_WIDTH, 0)).columns))
        )
    summary = {
        "output_path": str(folder),
        "kind": record["kind"],
        "model": record["model"],
        "blocks": len(record["kept"]) or record["blocks"],
        "block_flops_speedup": round(found["block_flops_speedup"], 4),
        "total_flops_speedup": round(found["total_flops_speedup"], 4),
        "fingerprint": record["fingerprint"],
        "logits_differ_by": agreed["logits"],
        "seconds": record["seconds"],
    }
    print(json.dumps({"export": summary}), flush=True)


def _check(options: dict[str, Any]) -> None:
    for name in ("method", "methods", "output_path"):
        if options[name] is not None:
            raise UserError(f"--check exports nothing; leave {name} out")
    from dyndepth.common.paths import path_of
    from dyndepth.export.check import check
    from dyndepth.models.loading import one_device

    folder = path_of(options["check"]).absolute()
    model = None if options["model"] == EMBEDDED else options["model"]
    found = check(folder, model, one_device(options["device"], "export"))
    print(json.dumps({"check": {"output_path": str(folder), **found}}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
