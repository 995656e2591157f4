"""Routers from files: those that come with the project, and those that a user names.

The project's lie in ``routers/<model fingerprint>/<target speedup>.{safetensors,json}``, one file
and one card a target, and are used only for that model and the method's default settings. A user's
are folders that ``dyndepth.fitting.fits.save_fit`` wrote.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from dyndepth.cells.identity import today
from dyndepth.common.errors import UserError
from dyndepth.fitting.fits import read_fit
from dyndepth.models.blocks import Decoder
from dyndepth.models.fingerprints import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from dyndepth.data.corpus import Corpus

    from .rule import RouterRule


ROUTERS = Path(__file__).parent / "routers"
# The address, and fields that change the calibration only.
_FREE = ("target_speedup", "phases", "kv")


def router_files(model: torch.nn.Module, target_speedup: float) -> tuple[Path, Path]:
    """Where the tensors and the card for this model and target lie, whether or not they exist."""
    folder = ROUTERS / fingerprint(model)
    return folder / f"{target_speedup:g}.safetensors", folder / f"{target_speedup:g}.json"


def load_shipped(
    method: RouterRule, model: torch.nn.Module, corpus: Corpus | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts shipped for just this; None where ``missing`` has a reason."""
    if missing(method, model, corpus):
        return None
    tensors, card = router_files(model, method.target_speedup)
    return load_file(tensors), json.loads(card.read_text(encoding="utf-8"))


def missing(method: RouterRule, model: torch.nn.Module, corpus: Corpus | None = None) -> str:
    """Why no shipped routers serve, for people; empty where some do."""
    own = [f for f in fields(method) if f.repr and f.name not in _FREE]
    set_here = [
        f"{f.name}={getattr(method, f.name)}" for f in own if getattr(method, f.name) != f.default
    ]
    if set_here:
        return f"none are shipped for {', '.join(set_here)}"
    tensors, card = router_files(model, method.target_speedup)
    if not tensors.parent.is_dir():
        return f"none are shipped for this model (fingerprint {fingerprint(model)})"
    if not (tensors.is_file() and card.is_file()):
        return f"none are shipped for a target of {method.target_speedup:g}"
    if corpus is None:
        return ""
    kept = json.loads(card.read_text(encoding="utf-8"))
    here = {"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer_fingerprint}
    for key, found in here.items():
        if kept[key] != found:
            return f"those shipped were trained with another {key} ({kept[key]}, not {found})"
    return ""


def save_shipped(method: RouterRule, model: torch.nn.Module, card: dict[str, Any]) -> Path:
    """Write a trained method's routers and its card; returns the tensors' path."""
    tensors, facts = router_files(model, method.target_speedup)
    tensors.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in method.tensors.items()}, tensors)
    facts.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return tensors


def load_named(
    method: RouterRule, model: torch.nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts from the folder that ``method.routers`` names.

    Raises UserError if they are no routers of this method, of another model, or of wrong shapes.
    """
    folder = (method.routers or "").rpartition("@")[0]
    record, tensors = read_fit(folder)
    if record["name"] != method.name:
        raise UserError(f"{folder!r} holds a fit of {record['name']}, not of {method.name}")
    if today(record["model"]) != (here := fingerprint(model)):
        raise UserError(
            f"the routers in {folder!r} are for another model (fingerprint {record['model']}, not "
            f"{here}); train them on this one"
        )
    check_shapes(folder, tensors, *Decoder.of(model).shape)
    return tensors, record["facts"]


def check_shapes(source: object, tensors: dict[str, Tensor], layers: int, hidden: int) -> None:
    """Refuse, with UserError, tensors that are no routers of a model of this depth and width."""
    width = tensors["inner"].shape[2] if tensors.get("inner", torch.empty(0)).ndim == 4 else hidden
    wanted = {"weight": (layers, 2, width), "bias": (layers, 2)}
    if "inner" in tensors:
        wanted |= {"inner": (layers, 2, width, hidden), "inner_bias": (layers, 2, width)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise UserError(
            f"the routers in {str(source)!r} have the shapes {found}, a model of {layers} blocks "
            f"and width {hidden} needs {wanted}"
        )
