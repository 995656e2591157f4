"""Exports a method: a plain checkpoint where one can hold it, else a folder for ``load_method``."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.files import replace_folder
from dyndepth.common.provenance import git_commit, processor, versions
from dyndepth.data.capacity import fitting
from dyndepth.data.tokenizers import tokenizer_fingerprint
from dyndepth.export import agreement, plain, reader
from dyndepth.export.card import card
from dyndepth.export.record import CARD, MODEL, check_replaceable, read_record, write_record
from dyndepth.fitting.calibration import prompt_of
from dyndepth.fitting.fits import save_fit
from dyndepth.fitting.recovery.adapters import adapted
from dyndepth.fitting.saved import METHOD
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.fingerprints import fingerprint
from dyndepth.runtime.attach import attach
from dyndepth.sweep.rerun import revision_of

_TEXT, _TEXT_LENGTH = 8, 256
"""Windows, and tokens in each, over which the achieved speedups are counted."""


def export(
    model: Any,
    tokenizer: Any,
    method: DynamicDepthMethod,
    corpus: Any,
    folder: Path,
    adapter: Any = None,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Write ``method``, fitted on ``model``, into ``folder``; returns the record that lies there.

    A method that leaves out the same whole blocks for every token becomes a checkpoint in Hugging
    Face format. Any other becomes the folder ``method`` for ``load_method``; with an ``adapter``
    beside it the folder ``model``, all blocks with the adapter merged in, which the method belongs
    to. What was there, an older export, is replaced when all is written and has been checked in
    another process, and stays if that fails.

    Raises UserError for what cannot be exported or a folder that holds something else, RunFailed if
    the export does not compute what the attached model does.
    """
    check_replaceable(folder)
    if method.uses_labels:
        raise UserError(
            f"{method.name} is a bound: it chooses by what no model in use can see, so there is "
            "nothing to export; export a method"
        )
    if method.speculates:
        raise UserError(
            f"{method.name} drafts what the whole model verifies: what it writes is that model's, "
            "and a checkpoint of it would be that model; keep what it fitted by method.save, or "
            "export its draft as a method"
        )
    plain.check_exportable(model)
    started, base = time.monotonic(), fingerprint(model)
    # Not the calibration text: too little of it for a short corpus.
    length = fitting(model, agreement.LENGTH + agreement.STEPS) - agreement.STEPS
    windows = corpus.windows(length, agreement.WINDOWS, 0, model=model).tolist()
    text = corpus.windows(fitting(model, _TEXT_LENGTH), _TEXT, 0, model=model)
    with adapted(model, adapter):
        with attach(model, method) as trace:
            wanted = reader.computed(model, windows, agreement.STEPS)
            executed = trace.executed()
        kept, reason = plain.kept_blocks(method, executed)
        measured = _measured(model, method, text, as_checkpoint=bool(kept))
        layers = len(executed)
        fresh = plain.shortened(model, kept or range(layers)) if kept or adapter else None
        record: dict[str, Any] = {
            "kind": "checkpoint" if kept else "method",
            "model": (MODEL if adapter else None) if reason else ".",
            "reason": reason,
            "blocks": layers,
            "kept": kept,
            "method": repr(method),
            "name": method.name,
            "paper": method.paper,
            "target_speedup": method.target_speedup,
            "recovery": adapter.card["recipe"] if adapter else "none",
            "adapter_sha256": adapter.card["sha256"] if adapter else None,
            "fingerprint": base if fresh is None else fingerprint(fresh),
            "base": _named(model) | {"fingerprint": base},
            "corpus": corpus.fingerprint,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "measured": measured,
            "versions": versions(),
            "commit": git_commit(),
            "command": command,
            "job": _job(model, windows, fresh, tokenizer is not None),
            "probe": agreement.sampled(wanted),
        }
        if fresh is not None:
            parts = Decoder.of(fresh)
            record["irregular"] = plain.irregular(parts.config, parts.record)
        with _written_beside(folder) as work:
            if fresh is not None:
                plain.write_checkpoint(fresh, tokenizer, work / str(record["model"]))
            if not kept:
                save_fit(method, model if fresh is None else fresh, work / METHOD)
            agreed = _agreed(work, record, wanted)
            record["agreement"] = dataclasses.asdict(agreed)
            record["seconds"] = round(time.monotonic() - started, 1)
            (work / CARD).write_text(card(record, folder.name), encoding="utf-8")
            write_record(work, record)
    return read_record(folder)


def _agreed(
    work: Path, record: dict[str, Any], wanted: dict[str, torch.Tensor]
) -> agreement.Agreement:
    """What the export in ``work`` computes in another process, against the attached model."""
    tolerance = agreement.TOLERANCE[record["job"]["dtype"]]
    try:
        if record["kind"] == "checkpoint":
            [found] = agreement.read_elsewhere([work], [record["job"]])
        else:
            found = agreement.attached_elsewhere(work, record)
        return agreement.compared(found, wanted, tolerance)
    except RunFailed as fault:
        raise RunFailed(
            f"nothing was exported: what was written was read back, and {fault}"
        ) from fault


def _measured(
    model: Any, method: DynamicDepthMethod, text: torch.Tensor, as_checkpoint: bool
) -> dict[str, Any]:
    """Achieved FLOPs speedups over windows of text; of a checkpoint without what the method itself
    costs, which is not in it."""
    device = next(model.parameters()).device
    with torch.inference_mode(), attach(model, method) as trace:
        trace.prompt_length = prompt_of(method, text.shape[1])
        for row in range(len(text)):
            trace.documents = [f"window {row}"]
            model(input_ids=text[row : row + 1].to(device), use_cache=False)
        totals = trace.totals("generation" if method.phases == "generation" else None)
    spent = totals["total_flops"]
    if as_checkpoint:
        spent = totals["block_flops"] + totals["by_cause"]["lm_head"]
    return {
        "block_flops_speedup": totals["dense_block_flops"] / max(totals["block_flops"], 1.0),
        "total_flops_speedup": totals["dense_total_flops"] / max(spent, 1.0),
        "windows": len(text),
        "length": text.shape[1],
        "phases": method.phases,
    }


def _named(model: Any) -> dict[str, Any]:
    """Name and revision of a model, as far as they are known, and the hub's commit if it is one."""
    info = getattr(model, "dyndepth", None)
    if info is None:
        return {"name": str(model.config._name_or_path), "revision": None, "commit": None}
    commit = revision_of({"model": info.name, "revision": info.revision}) or None
    return {"name": info.name, "revision": info.revision, "commit": commit}


def _job(model: Any, windows: list[list[int]], fresh: Any, tokenized: bool) -> dict[str, Any]:
    """How the export is to be read for a comparison; see ``agreement.read_elsewhere``."""
    parts = Decoder.of(model if fresh is None else fresh)
    weight = next(model.parameters())
    return {
        "windows": windows,
        "steps": agreement.STEPS,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "tokenizer": tokenized,
        "settings": plain.per_layer_settings(parts.config, parts.record),
    }


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of ``folder`` at the end, or is gone if that is not reached."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        for each in (work, *work.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o644)
        check_replaceable(folder)
        replace_folder(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
