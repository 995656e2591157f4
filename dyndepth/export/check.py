"""Checks an export again, wherever it lies now: its files by their hashes, what it computes by what
was recorded when it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.common.culprits import culprit
from dyndepth.common.errors import RunFailed
from dyndepth.common.provenance import processor, versions
from dyndepth.export import agreement
from dyndepth.export.attached import recomputed
from dyndepth.export.record import check_files, read_record


def check(folder: Path, model: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Check the export in ``folder``; returns what was found.

    ``model`` is where a method's model lies now, if it is not where it was. Raises UserError where
    there is no export, or its method's model cannot be had; RunFailed if something is not as it was
    exported: a file, the configuration as it is read, a logit or a token.
    """
    record = read_record(folder)
    try:
        check_files(folder, record)
        job = record["job"] | {"device": device}
        try:
            if record["kind"] == "checkpoint":
                [found] = agreement.read_elsewhere([folder], [job])
            else:
                found = recomputed(folder, record | {"job": job}, model)
            tolerance = agreement.TOLERANCE[job["dtype"]]
            if not _same_place(job, record):
                tolerance *= agreement.ELSEWHERE
            agreed = agreement.compared_with_sample(found, record["probe"], tolerance)
        except (KeyError, ValueError, IndexError, TypeError) as fault:
            if culprit(fault):  # the method's, not the record's
                raise
            raise RunFailed(f"its record can't be compared with ({fault!r})") from fault
    except RunFailed as fault:
        raise RunFailed(f"{str(folder)!r} is not what was exported: {fault}") from fault
    return {
        "kind": record["kind"],
        "files": len(record["files"]),
        "logits_differ_by": agreed.logits,
        "tolerance": agreed.tolerance,
        "tokens": agreed.tokens,
    }


def _same_place(job: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether sums are added up here as they were there: same processor, device and versions."""
    here = (processor(), job["device"], versions())
    return here == (job["processor"], record["job"]["device"], record["versions"])
