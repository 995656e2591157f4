"""Fitting as a command: ``python -m dyndepth.fit --methods METHOD --speedups 1.25 ...``.

Every parameter of the method is a flag. What is found goes into the cache, where sweeps find it,
and into a folder: ``fit/`` with tensors, facts and the training curve, ``curve.png``, with
``--recovery`` also ``recovery/`` with the adapter, and ``summary.json``. Interrupted or killed, the
same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.recipe import parse_recovery
from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import EMBEDDED, check_folder, file_part, slug
from dyndepth.data.capacity import check_length

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


_COMMON = ("target_speedup", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1 if training failed, 2 for wrong input, 130 after Ctrl-C."""
    return run("fit", _fit, arguments, "interrupted; the same command goes on where it stopped")


def parser(given: Sequence[str]) -> Parser:
    """The command line; a method named in ``given`` brings a flag for each of its parameters."""
    built = Parser(
        "fit",
        "Fit a method to a model: train its routers, solve its thresholds.",
        "`dyndepth fit --methods METHOD --help` lists the method's own parameters. For several "
        "GPUs: accelerate launch -m dyndepth.fit ...",
    )
    add = built.add_argument
    built.method("fit")
    add("method", nargs="?", help=argparse.SUPPRESS)
    built.model()
    built.speedup(1.25, "1.25")
    built.whole("seed", 0, "of everything random", 0)
    built.shared("corpus", EMBEDDED)
    add(
        "--recovery",
        default="none",
        help="none, lora or joint, with settings in brackets: 'lora(rank=8, steps=100)' "
        "(default: none)",
    )
    add("--output_path", metavar="FOLDER", help="for what was found (default: runs/fits/...)")
    add(
        "--refresh",
        action="store_true",
        help="fit again, whatever is kept or comes with the project",
    )
    from dyndepth.common.registry import method_class
    from dyndepth.common.spec import name_of

    asked = _asked(given)
    if asked is not None:
        name = name_of(asked, "method")
        own = built.add_argument_group(f"parameters of {name}")
        for field in dataclasses.fields(method_class(name)):
            if field.init and field.name not in _COMMON:
                text = "the preset's" if field.default is None else f"{field.default}"
                own.add_argument(
                    f"--{field.name}", dest=f"parameter {field.name}", metavar="VALUE",
                    help=f"(default: {text})",
                )  # fmt: skip
    return built


def _asked(given: Sequence[str]) -> str | None:
    """The method that the command line names: behind its flag, or by itself."""
    from dyndepth.common.registry import methods

    for number, word in enumerate(given, start=1):
        flag, equals, value = word.partition("=")
        if flag in ("--methods", "--method"):
            return value if equals else next(iter(given[number:]), None)
    first = given[0] if given and not given[0].startswith("-") else None
    return next((each for each in given if each in methods()), first)


def build(options: dict[str, Any]) -> DynamicDepthMethod:
    """The method that the flags describe, checked but not fitted. Raises UserError."""
    from dyndepth.common.registry import load_method
    from dyndepth.common.spec import value

    parameters = {
        name.removeprefix("parameter "): value(given)
        for name, given in options.items()
        if name.startswith("parameter ") and given is not None
    }
    common = {"target_speedup": options["speedups"], "seed": options["seed"]}
    return load_method(options["methods"], **parameters, **common)


def _fit(given: list[str]) -> None:
    """Fit, recover if asked to, and write; the last line printed is one JSON document."""
    built = parser(given)
    options = vars(built.parse_args(given))
    asked = {options["methods"], options.pop("method")} - {None}
    if len(asked) != 1:
        built.error("--methods takes one method" if asked else "--methods METHOD is missing")
    (options["methods"],) = asked
    method = build(options)
    recipe = parse_recovery(options["recovery"])
    if recipe is not None and recipe.kind == "joint" and not method.needs_training:
        raise UserError(
            f"{method.name} trains nothing, so there is nothing to train jointly; use lora"
        )
    output = check_folder("output_path", Path(options["output_path"] or _default_path(options)))

    from dyndepth.models.loading import layer_count, loaded, longest_window, named, resolve_device

    model_named = named(options)
    layers, most = layer_count(*model_named), longest_window(*model_named)
    check_length(most, method.window_length, method.name)
    if recipe is not None and recipe.kind == "lora":
        check_length(most, recipe.length, f"recovery {recipe.kind!r}")
    reach = method.max_speedup(layers)
    if not method.target_speedup <= reach:
        raise UserError(
            f"{method.name} reaches at most {reach:.3g}x on a model of {layers} blocks, "
            f"not {method.target_speedup:g}x"
        )

    import torch
    from accelerate import PartialState

    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.corpus import load_corpus
    from dyndepth.fitting.fits import fit_cached, save_fit
    from dyndepth.fitting.recovery.adapters import adaptable
    from dyndepth.models.loading import load_tokenizer
    from dyndepth.plots.fits import training_curve

    steady_allocator()
    device = resolve_device(options["device"])
    state = PartialState(cpu=device == "cpu")
    corpus = load_corpus(options["corpus"], load_tokenizer(*model_named))
    # Under `accelerate launch` each process has a device of its own.
    own = {"device": str(state.device)} if state.num_processes > 1 else {}
    model = loaded(options | own)
    if recipe is not None:
        adaptable(model, recipe)
    began = time.monotonic()
    if recipe is None or recipe.kind == "lora":
        method = fit_cached(method, model, corpus, refresh=options["refresh"])
    if recipe is not None:
        from dyndepth.fitting.recovery.kept import recover_cached

        refresh = options["refresh"]
        method, adapter = recover_cached(method, model, corpus, recipe, refresh=refresh)
    if not state.is_main_process:
        return
    save_fit(method, model, output / "fit")
    if recipe is not None:
        shutil.copytree(adapter.folder, output / "recovery", dirs_exist_ok=True)
    for curve, file in ((method.curve, "curve.png"), (recovered_curve(output), "recovery.png")):
        if curve:
            training_curve(curve, output / file)
    summary = {
        "method": repr(method),
        "model": options["model"],
        "corpus": corpus.fingerprint,
        "facts": method.facts,
        "recovery": str(recipe or "none"),
        "seconds": round(time.monotonic() - began, 1),
        "threads": torch.get_num_threads(),
        "output_path": str(output),
    }
    write_atomically(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps({"fit": summary}), flush=True)


def recovered_curve(output: Path) -> list[dict[str, float]]:
    """The curve of a recovery that was copied to ``output``; empty if there is none."""
    from dyndepth.fitting.fits import CURVE, read_curve

    return read_curve(output / "recovery" / CURVE)


def _default_path(options: dict[str, Any]) -> str:
    name = file_part(f"{options['methods']}-{options['speedups']:g}x")
    return str(Path("runs") / "fits" / slug(options["model"]) / name)


if __name__ == "__main__":
    sys.exit(main())
