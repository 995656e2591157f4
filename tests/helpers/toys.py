"""A method for the tests of the registry and of kept fits: it counts how often it is fitted."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from dyndepth.method import DynamicDepthMethod


@dataclass(kw_only=True)
class Toy(DynamicDepthMethod):
    """Keeps the mean of a window and the layer it was asked for."""

    name = "toy"
    granularity = "static"
    paper = "test"
    fits: ClassVar[int] = 0

    mode: Literal["mean", "maximum"] = "mean"
    layer: int | None = None
    threshold: float = 0.5
    strict: bool = False
    label: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must not be negative, not {self.layer}")

    def fit(self, model, corpus=None) -> Self:
        type(self).fits += 1
        window = corpus.windows(8, 1, self.seed).float() if corpus else torch.ones(1, 8)
        self.tensors = {"mean": window.mean(1), "mask": window.mean() < window.T}
        self.facts = {"layer": self.layer, "rates": [0.25, 1.0], "nested": {"met": True}}
        return self
