"""Methods that exist only to be put into a grid: none of them is ever run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Dense(DynamicDepthMethod):
    name = "dense"
    granularity = "static"
    paper = "control"

    def max_speedup(self, layers: int) -> float:
        return 1.0


@dataclass(kw_only=True)
class Steps(DynamicDepthMethod):
    """Can drop all blocks but two; lets one choose its phases."""

    name = "steps"
    granularity = "static"
    paper = "none"

    phases: Literal["generation", "both"] = "generation"
    rule: str = "even"
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, not {self.keep}")

    def max_speedup(self, layers: int) -> float:
        return layers / 2


@dataclass(kw_only=True)
class Fixed(DynamicDepthMethod):
    """Has no choice of phases."""

    name = "fixed"
    granularity = "token"
    paper = "none"
