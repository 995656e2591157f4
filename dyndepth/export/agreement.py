"""Whether an export computes what the attached model computed: by logits and greedy tokens, on a
few fixed windows of tokens, in another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth.common.errors import RunFailed
from dyndepth.export import reader

WINDOWS, LENGTH, STEPS = 2, 48, 16
"""Windows of text, tokens in each, and tokens that are then written."""

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""How far logits may differ on the machine that exported, times the largest logit if that is above
1: of half precision four roundings."""
ELSEWHERE = 10
"""On a machine of another kind sums are added up in another order: as many times as much."""

_COLUMNS = 64


@dataclass(frozen=True)
class Agreement:
    """How far two runs of the same windows differ: the largest difference of two ``logits``, and
    what was tolerated; ``tokens`` of the greedy text that were compared, up to a tie."""

    logits: float
    tolerance: float
    tokens: int


def compared(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float
) -> Agreement:
    """Compare two results of ``reader.computed``. ``tolerance`` is for logits of 1 at most.

    Where two candidates are as good as equal, one may be written here and the other there; what
    follows in that window is another text, and is not compared. Raises RunFailed if the two differ
    by more.
    """
    pairs = [(found["logits"], wanted["logits"])]
    tokens = 0
    for row, (one, other) in enumerate(zip(found["generated"], wanted["generated"], strict=True)):
        apart = (one != other).nonzero().flatten().tolist()
        same = apart[0] if apart else len(one)
        tokens += same
        # The logits of the first token that differs are still of one and the same text.
        pairs.append(
            (found["step_logits"][row, : same + 1], wanted["step_logits"][row, : same + 1])
        )
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    bound = tolerance * max(1.0, largest)
    gaps = []
    for where, (ours, theirs) in enumerate(pairs):
        if ours.shape != theirs.shape:
            raise RunFailed(f"its logits are {list(ours.shape)}, not {list(theirs.shape)}")
        gap = float((ours - theirs).abs().max())
        if not gap <= bound:
            raise RunFailed(
                f"its logits differ by up to {gap:.3g} {'in steps over a cache ' if where else ''}"
                f"from those that it should have, and {bound:.3g} is tolerated"
            )
        gaps.append(gap)
    return Agreement(max(gaps), bound, tokens)


def sampled(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """A small part of ``reader.computed`` that a record can hold: of each position the logits of
    some tokens, evenly spaced, and the logarithm of the sum of the exponentials of all."""
    vocabulary = found["logits"].shape[-1]
    columns = list(range(0, vocabulary, max(1, vocabulary // _COLUMNS)))[:_COLUMNS]
    kept = {name: _part(found[name], columns).tolist() for name in ("logits", "step_logits")}
    return {"columns": columns, **kept, "generated": found["generated"].tolist()}


def compared_with_sample(
    found: Mapping[str, Tensor], kept: Mapping[str, Any], tolerance: float
) -> Agreement:
    """``compared``, with what ``sampled`` kept. Raises KeyError, ValueError, IndexError or
    TypeError for what is no such thing, RunFailed as ``compared`` does."""
    import torch

    names = ("logits", "step_logits")
    ours = {name: _part(found[name], kept["columns"]) for name in names}
    theirs = {name: torch.tensor(kept[name]) for name in names}
    generated = torch.tensor(kept["generated"])
    return compared(
        ours | {"generated": found["generated"]}, theirs | {"generated": generated}, tolerance
    )


def _part(logits: Tensor, columns: Sequence[int]) -> Tensor:
    import torch

    return torch.cat([logits[..., list(columns)], logits.logsumexp(-1, keepdim=True)], -1)


def read_elsewhere(
    folders: Sequence[Path], jobs: Sequence[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """What the checkpoints in ``folders`` compute in a process that has nothing of this project.

    Each of ``jobs`` has the keys ``windows``, ``steps``, ``dtype``, ``device``,
    ``attn_implementation``, ``threads``, ``tokenizer`` (whether there is one) and ``settings``,
    which the configuration must be read as. Returns what ``reader.computed`` does. Raises RunFailed
    for a checkpoint that cannot be loaded, or not as a whole.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="dyndepth-export-") as place:
        # -P: what lies in the working folder is not imported.
        command = [sys.executable, "-P", reader.__file__]
        results = []
        for number, (folder, job) in enumerate(zip(folders, jobs, strict=True)):
            given = Path(place) / f"{number}.json"
            given.write_text(json.dumps(job), encoding="utf-8")
            results.append(given.with_suffix(".safetensors"))
            command += [str(folder.absolute()), str(given), str(results[-1])]
        # torch would bring every installed package that registers with it, this one among them.
        done = _run(command, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"})
        said = [json.loads(line) for line in done.splitlines()[-len(jobs) :]]
        for each, job in zip(said, jobs, strict=True):
            if each["imported"]:
                raise RunFailed("the process that read it had imported this project")
            if each["loader"]:
                kind, names = next(iter(each["loader"].items()))
                raise RunFailed(f"its loader reports {kind}: {', '.join(names[:3])}")
            if each["settings"] != job["settings"]:
                raise RunFailed(f"its configuration is read as {json.dumps(each['settings'])}")
        return [load_file(result) for result in results]


def attached_elsewhere(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """What the method in the export ``folder`` computes, attached to its model, in another process
    of this project. Raises RunFailed if it cannot be loaded there."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="dyndepth-export-") as place:
        given, result = Path(place) / "record.json", Path(place) / "found.safetensors"
        given.write_text(json.dumps(record), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "dyndepth.export.attached"]
        path = {"PYTHONPATH": os.pathsep.join(_path())}
        _run([*command, str(folder.absolute()), str(given), str(result)], path)
        return load_file(result)


def _path() -> list[str]:
    """Where this process imports from, so that another has the same methods; this very package
    comes before any other of its name."""
    home = Path(__file__).resolve().parents[2]
    folders = [Path(each).absolute() for each in sys.path]
    others = (each for each in folders if (each / "dyndepth").is_dir())
    first = [home] if next(others, None) != home else []
    return [str(each) for each in [*first, *folders]]


def _run(command: Sequence[str], more: dict[str, str]) -> str:
    words = [*command]
    done = subprocess.run(  # nosec B603  # this interpreter, a file of this package, paths
        words, capture_output=True, text=True, encoding="utf-8", env=os.environ | more
    )
    if done.returncode:
        last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RunFailed(f"another process cannot use it ({''.join(last) or done.returncode})")
    return done.stdout
