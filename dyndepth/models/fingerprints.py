"""Digests that say what a model computes.

Cells, fits and what is shipped are bound to them, so they cover all that can change a number:
everything in a configuration but for the short list ``IMMATERIAL``, every stored value, and the
settings that a model ships for generation. Names and places are no part of them. One model has one
digest in every type, so values count as bfloat16; what lies below that, cells tell apart by the
``revision`` beside, and cached fits by ``checksum``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dyndepth.common.digests import brought_code, facts_digest

if TYPE_CHECKING:
    import torch


IMMATERIAL = {
    "_name_or_path": "where it lay",
    "_model_name_or_path": "where it lay, as converters name it",
    "_commit_hash": "the hub's name of that place",
    "architectures": "the class follows from model_type",
    "auto_map": "where a model's own code lies; the code itself is hashed",
    "transformers_version": "what wrote the file; the version that runs is recorded beside",
    "dtype": "the type that is asked for is recorded beside",
    "torch_dtype": "dtype by its old name",
    "_from_model_config": "where generation settings came from",
    "initializer_range": "random weights before training",
    "init_std": "random weights before training",
    "pad_token_id": "padding is masked",
    "id2label": "names of a classifier's classes",
    "label2id": "names of a classifier's classes",
    "problem_type": "loss of a classifier",
    "use_cache": "whether a forward returns its cache",
    "output_attentions": "what a forward returns beside its logits",
    "output_hidden_states": "what a forward returns beside its logits",
    "return_dict": "in which form a forward returns them",
}
"""Names in a configuration that cannot change a number, and why."""

_STAND_IN, _AT_REST = "dyndepth_known_as", "dyndepth_at_rest"
_CHUNK, _PART = 1 << 22, 1 << 18
_WORDS = ("int64", "int32", "int16", "int8")


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that identify the function a model computes.

    A hash over its configuration and generation settings, but for ``IMMATERIAL``, over the code
    that it brought along, and over each stored tensor's name, shape and values as bfloat16: loads
    in float32 and bfloat16 agree, whatever the device, and so do those in float16 that
    ``load_model`` made. A fine-tuned or differently configured model differs, unless no value
    changed by as much as bfloat16 shows. Inside ``dyndepth.fitting.recovery.adapters.adapted`` it
    is another one, however little the adapter changes.
    """
    facts = {
        "config": _facts(model.config),
        "generation": _facts(getattr(model, "generation_config", None)),
        "code": brought_code(model, model.config),
        "values": values_digest(model),
    }
    return facts_digest(facts)[:16]


_digests: dict[str, str] = {}
"""Checksum -> digest of all values, so that a second look at the same values is cheap."""


def values_digest(model: torch.nn.Module) -> str:
    """Digest of a model's stored values; or what the values that it has go by: those that
    ``load_model`` rounded to float16 by those of the file, merged ones by what was merged."""
    state = checksum(model)
    rounded = getattr(getattr(model, "dyndepth", None), "rounded", None)
    for known in (getattr(model, _STAND_IN, None), rounded):
        if known is not None and known[0] == state:
            return str(known[1])
    if state not in _digests:
        _digests[state] = _hashed_values(model)
    return _digests[state]


@contextmanager
def known_as(model: torch.nn.Module, digest: str, before: str | None = None) -> Iterator[None]:
    """The values that ``model`` holds now go by ``digest`` inside the ``with`` block; ``before`` is
    its fingerprint without what was merged into it."""
    setattr(model, _STAND_IN, (checksum(model), digest, before))
    try:
        yield
    finally:
        delattr(model, _STAND_IN)


def original(model: torch.nn.Module) -> str | None:
    """Fingerprint of ``model`` before something was merged into it; None where nothing is."""
    known = getattr(model, _STAND_IN, None)
    return None if known is None else known[2]


@contextmanager
def at_rest(model: torch.nn.Module) -> Iterator[None]:
    """Inside the ``with`` block nothing changes the values of ``model``, so they are read once."""
    if _AT_REST in vars(model):
        yield
        return
    setattr(model, _AT_REST, checksum(model))
    try:
        yield
    finally:
        vars(model).pop(_AT_REST, None)


# --- what is hashed -----------------------------------------------------------------------------


def _facts(config: Any) -> dict[str, Any]:
    """The settings of a configuration that can change a number, as far as they are not its class's
    defaults: a setting that a later version adds says nothing until somebody sets it."""
    if config is None:
        return {}
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()
    given = config.to_dict()
    missing = object()
    return {
        key: value
        for key, value in given.items()
        if key not in IMMATERIAL and (key == "model_type" or value != defaults.get(key, missing))
    }


def _hashed_values(model: torch.nn.Module) -> str:
    """Digest over all values, floating ones as bfloat16."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in _stored(model):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        for part in tensor.reshape(-1).split(_CHUNK):
            values = part.to(torch.bfloat16) if part.is_floating_point() else part
            digest.update(_bytes(values))
    return digest.hexdigest()


def checksum(model: torch.nn.Module) -> str:
    """Digest over sums of the bits in each row and column, each word times an odd number of its
    place: many times as fast as one over all values, and another one whenever values change or
    move."""
    import torch

    if (known := vars(model).get(_AT_REST)) is not None:
        return str(known)
    digest = hashlib.sha256()
    for name, tensor in _stored(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.ndim < 2:
            digest.update(_bytes(tensor))
            continue
        rows = tensor.flatten(1).contiguous()
        rows = rows.clone() if rows.storage_offset() else rows
        size = rows.shape[1] * rows.element_size()
        words = next(w for w in _WORDS if size % getattr(torch, w).itemsize == 0)
        bits = rows.view(getattr(torch, words))
        across, down = (_odd(count, bits.device) for count in reversed(bits.shape))
        sums = [torch.zeros(count, dtype=torch.int64, device=bits.device) for count in bits.shape]
        step = max(1, _PART // max(1, bits.shape[1]))
        for start in range(0, bits.shape[0], step):
            part = slice(start, start + step)
            own = bits[part].long()
            own = own ^ _shifted(own, 32)  # what differs in high bits alone is not multiplied away
            sums[0][part] = (own * across).sum(1)
            sums[1] += (own * down[part, None]).sum(0)
        for each in sums:
            digest.update(_bytes(each))
    return digest.hexdigest()


def _odd(count: int, device: torch.device) -> torch.Tensor:
    """The first ``count`` of a fixed row of odd numbers that look random (splitmix64)."""
    import torch

    found = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    found = (found ^ _shifted(found, 30)) * -0x40A7B892E31B1A47
    found = (found ^ _shifted(found, 27)) * -0x6B2FB644ECCEEE15
    return (found ^ _shifted(found, 31)) | 1


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Words of 64 bits moved down, zeros coming from above."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers as a checkpoint holds them, each once, by name. Other buffers follow
    from the configuration, and some change with the longest text that was read."""
    from accelerate.utils import align_module_device

    kept = model.state_dict().keys()
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: each for name, each in model.named_buffers() if name in kept}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:  # offloaded: it is brought for as long as it is read
            owner, _, own = name.rpartition(".")
            with align_module_device(model.get_submodule(owner), "cpu"):
                yield name, _plain(getattr(model.get_submodule(owner), own).detach())
        else:
            yield name, _plain(tensor.detach())


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight as an ordinary tensor; a quantised one is a tensor of a kind of its own."""
    import torch

    ordinary = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return weight if ordinary else weight.dequantize()


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
