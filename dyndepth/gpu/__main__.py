"""The command line ``python -m dyndepth.gpu``: ten minutes of a GPU, and what they show.

The words ``checks`` and ``training`` run one of its parts in this process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndepth.common.commands import HELP, Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.paths import made_folder, path_of

PARTS = ("checks", "bench", "training", "sweep", "tests")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if something failed or was cut off, 2 for wrong input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    alone = {"checks": _checks, "training": _training}
    if given and given[0] in alone:
        return run("gpu", alone[given[0]], given[1:])
    return run("gpu", _gpu, given)


def _gpu(given: list[str]) -> int:
    if given and not given[0].startswith("-"):
        raise UserError(
            f"there is no gpu {given[0]!r}; say checks or training, or give flags alone"
        )
    parser = Parser(
        "gpu",
        "Check and measure on a GPU what can only be known there, in ten minutes: exactness, speed "
        "of an 8B shape eager and by graphs, training, the embedded sweep, the tests. One folder "
        "comes out, with status.md to read first. Needs no hub; called again, it goes on.",
    )
    parser.shared("device", "auto", "one_device")
    parser.number(
        "minutes",
        lambda minutes: minutes > 0,
        "a number above 0",
        "for all parts; what there is no time for is named, the least important first "
        "(default: 10)",
        10.0,
    )
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="part",
        help=f"of {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--methods",
        default=[],
        nargs="+",
        metavar="METHODS",
        help=f"{HELP['methods']}; of the sweep",
    )
    parser.add_argument(
        "--small", action="store_true",
        help="tiny models and few rounds: shows on a CPU that it runs, and measures nothing",
    )  # fmt: skip
    parser.add_argument(
        "--output_path", type=path_of, metavar="FOLDER", help="default: runs/gpu-CARD"
    )
    options = parser.parse_args(given)
    options.methods = ",".join(word.strip(" ,") for word in options.methods)
    return _run(options)


def _run(options: Any) -> int:
    from dyndepth.common.files import write_atomically
    from dyndepth.common.paths import file_part
    from dyndepth.gpu.parts import about, run_all
    from dyndepth.gpu.report import failures, page, read
    from dyndepth.models.loading import one_device

    device = one_device(options.device, "this command")
    if device == "cpu" and not options.small:
        raise UserError(
            "no GPU is here to be measured; --small --device cpu shows that everything runs"
        )
    card = about(device)["card"]
    folder: Path = options.output_path or Path("runs") / f"gpu-{file_part(card.replace(' ', '-'))}"
    folder = made_folder("output_path", folder)
    run_all(folder, device, options.minutes, options.small, options.methods, options.parts)
    facts = read(folder)
    assert facts is not None
    write_atomically(folder / "status.md", page(facts))
    print(f"\n{page(facts)}\nin {folder}/: status.md, gpu.json, and what each part said")
    return 1 if failures(facts) else 0


def _alone(name: str, text: str, given: list[str]) -> Any:
    parser = Parser(f"gpu {name}", text)
    parser.shared("device", "auto", "one_device")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--output_path", type=path_of, metavar="FOLDER", help=f"for {name}.json")
    options = parser.parse_args(given)

    from dyndepth.models.loading import one_device

    options.device = one_device(options.device, "this command")
    if options.output_path is not None:
        options.output_path = made_folder("output_path", options.output_path)
    return options


def _write(options: Any, name: str, found: Any) -> None:
    from dyndepth.common.files import write_atomically

    if options.output_path is not None:
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(options.output_path / f"{name}.json", text)
    print(json.dumps({name: found}))


def _checks(given: list[str]) -> int:
    """Run the checks here; 1 if one failed."""
    options = _alone("checks", "Check on a tiny model that results are exact on a device.", given)
    from dyndepth.gpu.checks import run as run_checks

    found = run_checks(options.device)
    _write(options, "checks", found)
    failed = [name for name, each in found.items() if each["status"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _training(given: list[str]) -> None:
    """Measure training here."""
    options = _alone("training", "Measure how many tokens a second router training reads.", given)
    from dyndepth.gpu.training import measure

    _write(options, "training", measure(options.device, options.small))


if __name__ == "__main__":
    sys.exit(main())
