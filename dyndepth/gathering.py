"""When gathering the selected tokens pays, and when the dense kernel is faster for the same result.

Under a token mask a sublayer either runs for the gathered tokens alone, or for all of them, whose
result is then taken where the mask says so. Gathering costs copies, an explicit attention mask and
smaller matrix products; with few tokens to skip or few tokens at all it saves less than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dyndepth.method import ATTENTION
from dyndepth.selection import Selection


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


ALWAYS = Limits(attention=1.0, mlp=1.0, tokens=0)
"""Nothing that is skipped is computed."""

_EXACT = Limits(attention=0.85, mlp=0.90, tokens=64)
_COARSE = Limits(attention=0.75, mlp=0.85, tokens=64)


def limits_of(model: nn.Module) -> Limits:
    """The rule for a model: by its precision, as measured on a CPU with blocks 576 wide."""
    dtype = next(model.parameters()).dtype
    return _EXACT if dtype in (torch.float32, torch.float64) else _COARSE
