"""Imports router checkpoints of the published layout, for use with the model they were trained on.

``python -m dyndepth.methods.skipgpt.published router.pth --model ... --output_path FOLDER`` writes
the folder that ``skipgpt(routers=FOLDER, normalise=false, threshold=zero)`` takes, and prints what
the routers execute on calibration text as one line of JSON. Without ``threshold=zero`` the method
solves the threshold for its target.

The layout is a PyTorch state dict with, for each block N and each of attention and mlp,
``model.layers.N.router_attention.weight_predictor.weight`` ``[2, hidden]`` and ``.bias`` ``[2]``:
two logits of the raw residual stream at the block's entry, 0 executes and 1 skips. Their difference
is this project's one logit, with the threshold at zero; a tie executes. Source: checkpoints beside
public SkipGPT code (arXiv 2506.04179). Files are read without unpickling objects.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.method import SUBLAYERS
from dyndepth.methods.skipgpt import SkipGPT
from dyndepth.models.blocks import Decoder

_KEY = re.compile(r"model\.layers\.(\d+)\.router_(attention|mlp)\.weight_predictor\.(weight|bias)")
_MLP = re.compile(
    r"model\.layers\.\d+\.router_(attention|mlp)\.weight_predictor\.\w+\.(weight|bias)"
)
_WINDOWS, _LENGTH = 8, 256


def read_published(
    path: str | Path, model: torch.nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a ``SkipGPT(normalise=False)`` from the checkpoint at ``path``.

    Returns ``weight`` float32 ``[layers, 2, hidden]`` and ``bias`` float32 ``[layers, 2]`` (execute
    minus skip; attention, mlp), and the facts ``threshold`` 0.0 and ``imported``, the file's name.
    Raises UserError if the file is missing, is no such checkpoint or was made for a model of
    another depth or width.
    """
    state = _state_dict(path_of(path))
    layers, hidden = Decoder.of(model).shape
    weight, bias = torch.zeros(layers, 2, hidden), torch.zeros(layers, 2)
    needed = {
        f"model.layers.{layer}.router_{kind}.weight_predictor.{part}": (layer, sublayer, part)
        for layer in range(layers)
        for sublayer, kind in enumerate(SUBLAYERS)
        for part in ("weight", "bias")
    }
    _check_keys(path, state, needed, layers)
    for key, (layer, sublayer, part) in needed.items():
        wanted = (2, hidden) if part == "weight" else (2,)
        if tuple(state[key].shape) != wanted:
            raise UserError(
                f"{key} in {str(path)!r} has the shape {list(state[key].shape)}, this model needs "
                f"{list(wanted)}; give the model that the routers were trained on"
            )
        execute, skip = state[key].float()
        (weight if part == "weight" else bias)[layer, sublayer] = execute - skip
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"{str(path)!r} holds values that are not finite; get the file again")
    facts = {"threshold": 0.0, "normalise": False, "imported": Path(path).name}
    return {"weight": weight, "bias": bias}, facts


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; nothing but tensors in a mapping is accepted."""
    if not path.is_file():
        raise UserError(f"no router checkpoint at {str(path)!r}; give the .pth file itself")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        raise UserError(
            f"{str(path)!r} is no checkpoint of plain tensors: it is garbled, or holds objects "
            "that would run code, which are never loaded"
        ) from fault
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as fault:
        reason = " ".join(str(fault).split())[:120] or type(fault).__name__
        raise UserError(f"{str(path)!r} can't be read as a checkpoint ({reason})") from fault
    plain = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not plain:
        raise UserError(f"{str(path)!r} is no mapping of names to tensors, as router files are")
    return state


def _check_keys(path: str | Path, state: dict[str, Tensor], needed: Any, layers: int) -> None:
    """Refuse a checkpoint that has other keys than ``needed``."""
    if any(_MLP.fullmatch(key) for key in state):
        raise UserError(
            f"{str(path)!r} holds MLP routers; only the published linear ones can be imported"
        )
    unknown = sorted(key for key in state if not _KEY.fullmatch(key))
    if unknown:
        raise UserError(
            f"{str(path)!r} holds {len(unknown)} tensors that belong to no router, {unknown[0]!r} "
            "the first; give the file that holds the routers alone"
        )
    found = {int(key.split(".")[2]) for key in state}
    if found and found != set(range(max(found) + 1)):
        absent = min(set(range(max(found) + 1)) - found)
        raise UserError(f"{str(path)!r} has no routers for block {absent}; get a complete file")
    if len(found) != layers:
        raise UserError(
            f"{str(path)!r} holds routers for {len(found)} blocks, the model has {layers}; give "
            "the model that they were trained on"
        )
    missing = next((key for key in needed if key not in state), None)
    if missing:
        raise UserError(f"{str(path)!r} lacks {missing}; get a complete file")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m dyndepth.methods.skipgpt.published",
        description="Import a router checkpoint of the published layout, and measure it.",
    )
    add = parser.add_argument
    add("checkpoint", help="the .pth file")
    add("--model", required=True, help="that they were trained on: a hub id or a local path")
    add("--output_path", "--output-path", required=True, help="folder for the routers")
    add(
        "--target_speedup",
        "--target-speedup",
        type=float,
        help="solve the threshold for this block speedup, instead of zero as published",
    )
    add("--corpus", default="embedded", help="calibration text: 'embedded', .txt or .jsonl")
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ... or auto")
    add("--revision", help="branch, tag or commit of a hub model")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except UserError as fault:
        print(f"dyndepth.methods.skipgpt.published: {fault}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    """Load, convert, measure, write, print."""
    from dyndepth.data.capacity import fitting
    from dyndepth.data.corpus import load_corpus
    from dyndepth.fitting.calibration import measured
    from dyndepth.fitting.fits import save_fit
    from dyndepth.models.loading import load_model, load_tokenizer

    target = options.target_speedup
    if target is not None and not target > 1.0:
        raise UserError(f"--target_speedup takes a number above 1, not {target:g}")
    _state_dict(path_of(options.checkpoint))  # before minutes of loading a model
    model = load_model(
        options.model, dtype=options.dtype, device=options.device, revision=options.revision
    )
    tensors, facts = read_published(options.checkpoint, model)
    corpus = load_corpus(options.corpus, load_tokenizer(options.model, options.revision))
    length = fitting(model, _LENGTH)
    windows = corpus.windows(length, _WINDOWS, 0, split="calibration", model=model)
    # Any target above 1 lets the routers decide; what they reach is measured.
    threshold: Any = "zero" if target is None else "solved"
    method = SkipGPT(target_speedup=target or 2.0, normalise=False, threshold=threshold)
    method.tensors, method.facts = tensors, facts
    if target is not None:
        method.calibrate(model, corpus)
    found = measured(model, method, windows)
    method.facts["achieved_speedup"] = found.speedup
    method.target_speedup = target or max(1.0, round(found.speedup, 3))
    save_fit(method, model, options.output_path)
    print(
        json.dumps(
            {
                "published": {
                    "checkpoint": options.checkpoint,
                    "model": options.model,
                    "output_path": options.output_path,
                    "threshold": method.facts["threshold"],
                    "block_speedup": found.speedup,
                    "executed": dict(zip(SUBLAYERS, found.executed.mean(0).tolist(), strict=True)),
                    "tokens": windows.numel(),
                    "spec": f"{method.name}(routers={options.output_path}, normalise=false"
                    f"{', threshold=zero' if target is None else ''})",
                }
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
