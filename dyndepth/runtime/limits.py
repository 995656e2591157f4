"""From which share on selected tokens are gathered: as measured and kept, else by kind of
device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dyndepth.common.files import cache_root, write_atomically
from dyndepth.method import ATTENTION
from dyndepth.models.blocks import causal_lm
from dyndepth.models.selection import Selection


@dataclass(frozen=True)
class Limits:
    """The largest executed shares of all tokens, padding included, for which a sublayer is
    gathered, and the least number of tokens in a forward."""

    attention: float
    mlp: float
    tokens: int

    def gather(self, sublayer: int, selection: Selection) -> bool:
        """Whether ``sublayer`` runs for the selected tokens alone."""
        share = self.attention if sublayer == ATTENTION else self.mlp
        total = selection.mask.numel()
        return total >= self.tokens and selection.count <= share * total

    def among(self, selection: Selection) -> bool:
        """Whether an attention runs among the selected tokens alone, where nobody sees the others:
        whatever their share, it then needs fewer keys, too, and mostly no mask."""
        return selection.mask.numel() >= self.tokens


ALWAYS = Limits(attention=1.0, mlp=1.0, tokens=0)
"""Nothing that is skipped is computed."""

_EXACT = Limits(attention=0.85, mlp=0.90, tokens=64)
_COARSE = Limits(attention=0.75, mlp=0.85, tokens=64)
# Below so many tokens the host is what a GPU waits for, and gathering is more work for the host.
_ACCELERATOR = Limits(attention=0.8, mlp=0.85, tokens=1024)


def limits_of(model: nn.Module) -> Limits:
    """The rule for a model: as measured on this device, else by its kind and the precision."""
    try:
        found = json.loads(_file(model).read_text(encoding="utf-8"))
        return Limits(float(found["attention"]), float(found["mlp"]), int(found["tokens"]))
    except (OSError, ValueError, TypeError, KeyError):
        parameter = next(model.parameters())
        if parameter.device.type != "cpu":
            return _ACCELERATOR
        return _EXACT if parameter.dtype in (torch.float32, torch.float64) else _COARSE


def keep(model: nn.Module, limits: Limits) -> Path:
    """Keep measured limits for models of this width and precision on this device."""
    file = _file(model)
    write_atomically(file, json.dumps(asdict(limits)))
    return file


def _file(model: nn.Module) -> Path:
    parameter, config = next(model.parameters()), causal_lm(model).config
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = [
        name,
        str(parameter.dtype),
        config.model_type,
        config.hidden_size,
        config.num_attention_heads,
        config._attn_implementation,
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return cache_root() / "limits" / f"{key}.json"
