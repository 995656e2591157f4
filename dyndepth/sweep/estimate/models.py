"""The model that is planned for: its modules without weights, and, where it is here and small, the
model itself, on which this machine is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyndepth.common.paths import EMBEDDED, path_of
from dyndepth.models.shapes import is_shape

if TYPE_CHECKING:
    from dyndepth.sweep.estimate.machines import Machine
    from dyndepth.sweep.settings import Settings

LARGEST = 2 * 2**30
"""Bytes of weights up to which a dry run loads a model to measure it: some seconds."""
WHOLE = 0.8
"""Assumed share of the rate of a block's products that a whole block reaches: attention, norms and
activations are the rest."""


def skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's modules without their weights, on torch's meta device.

    Raises:
        UserError: a missing model or an unsupported architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dyndepth.models.loading import checked_config

    config = checked_config(name, revision, trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Shape:
    """What the arithmetic and the memory of a model follow from.

    Attributes:
        costs: FLOPs of its blocks and head, ``runtime.flops.BlockCosts``.
        layers, hidden, inner, vocabulary: blocks, and sizes of the stream, the MLP, the head.
        parameters: all, and those of the blocks and of the head.
        cache: values that a token leaves in the caches of all blocks.
        size: bytes of a value.
    """

    costs: Any
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    parameters: int
    in_blocks: int
    in_head: int
    cache: int
    size: int

    @classmethod
    def of(cls, model: Any, dtype: str) -> Shape:
        """Of a model or its skeleton, with weights of that type."""
        from dyndepth.models.blocks import Decoder
        from dyndepth.runtime.flops import BlockCosts

        parts = Decoder.of(model)
        layers, hidden = parts.shape
        costs = BlockCosts.of_parts(parts)
        return cls(
            costs=costs,
            layers=layers,
            hidden=hidden,
            # Three products of the stream's width make a gated MLP, two a plain one.
            inner=int(costs.mlp.max()) // (6 * hidden),
            vocabulary=costs.lm_head // (2 * hidden),
            parameters=sum(each.numel() for each in model.parameters()),
            in_blocks=sum(each.numel() for layer in parts.layers for each in layer.parameters()),
            in_head=costs.lm_head // 2,
            cache=int(costs.key_value.sum()) // (2 * hidden),
            size=4 if dtype == "float32" else 2,
        )

    def flops(self, keys: float) -> float:
        """Of one token through all blocks."""
        return self.costs.block(keys)


def loaded(settings: Settings, shape: Shape, device: str) -> Any:
    """The model itself, if it lies here and is small; else None."""
    from dyndepth.models.loading import SPREAD, load_model

    here = settings.model == EMBEDDED or path_of(settings.model).is_dir()
    if is_shape(settings.model) or not here or shape.parameters * shape.size > LARGEST:
        return None
    if settings.device == SPREAD:
        return None
    return load_model(
        settings.model,
        dtype=settings.dtype,
        device=device,
        attn_implementation=settings.attn_implementation,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def measured_by(model: Any, shape: Shape, device: str, dtype: str) -> Machine:
    """This machine, measured by forwards of the model; where it is not here (``model`` is its
    skeleton), by the products of one of its blocks."""
    import torch

    from dyndepth.models.blocks import Decoder
    from dyndepth.sweep.estimate.machines import MANY, measured
    from dyndepth.timing.pairing import draining

    drain = draining(device)
    if next(model.parameters()).device.type != "meta":
        from dyndepth.evaluation.forwards import forward

        def whole(tokens: int) -> None:
            ids = torch.ones(1, tokens, dtype=torch.long, device=device)
            with torch.no_grad():
                forward(model, ids, torch.ones_like(ids))
            drain()

        flops, read = shape.flops(MANY), shape.in_blocks * shape.size
        return measured(device, flops, read, whole, "the model runs")

    layer = Decoder.of(model).layers[0]
    sizes = [tuple(one.shape) for one in layer.parameters() if one.ndim == 2]
    weights = [torch.ones(size, dtype=getattr(torch, dtype), device=device) for size in sizes]
    inputs = {
        width: torch.ones(MANY, width, dtype=getattr(torch, dtype), device=device)
        for width in {size for pair in sizes for size in pair}
    }

    def products(tokens: int) -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]][:tokens], weight.T)
        drain()

    numbers = sum(one.numel() for one in weights)
    said = f"the products of one block, at {WHOLE:.0%} of their rate, run"
    return measured(device, 2 * numbers * WHOLE, numbers * shape.size, products, said)
