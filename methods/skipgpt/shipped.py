"""Routers that come with the project: one safetensors file and one JSON card a target.

They lie in ``routers/<model fingerprint>/<target speedup>.{safetensors,json}`` and are used only
for that model and the method's default hyper-parameters.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from dyndepth.models import fingerprint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from . import SkipGPT

ROUTERS = Path(__file__).parent / "routers"
# The address, and a field that changes the calibration only.
_FREE = ("target_speedup", "phases")


def router_files(model: torch.nn.Module, target_speedup: float) -> tuple[Path, Path]:
    """Where the tensors and the card for this model and target lie, whether or not they exist."""
    folder = ROUTERS / fingerprint(model)
    return folder / f"{target_speedup:g}.safetensors", folder / f"{target_speedup:g}.json"


def load_shipped(
    method: SkipGPT, model: torch.nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts shipped for this model and target; None if there are none that fit."""
    given = {f.name: (getattr(method, f.name), f.default) for f in fields(method)}
    if any(value != default for name, (value, default) in given.items() if name not in _FREE):
        return None
    tensors, card = router_files(model, method.target_speedup)
    if not (tensors.is_file() and card.is_file()):
        return None
    return load_file(tensors), json.loads(card.read_text(encoding="utf-8"))


def save_shipped(method: SkipGPT, model: torch.nn.Module, card: dict[str, Any]) -> Path:
    """Write a trained method's routers and its card; returns the tensors' path."""
    tensors, facts = router_files(model, method.target_speedup)
    tensors.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in method.tensors.items()}, tensors)
    facts.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return tensors


def load_all_shipped(model: torch.nn.Module) -> list[SkipGPT]:
    """A method for each set of routers shipped for this model."""
    from . import SkipGPT

    found = []
    for path in sorted((ROUTERS / fingerprint(model)).glob("*.safetensors")):
        found.append(SkipGPT(target_speedup=float(path.stem)))
        found[-1].tensors = load_file(path)
    return found
