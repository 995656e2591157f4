"""What an exported method computes, attached to its model: run as a script by ``agreement``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from dyndepth.common.culprits import told
from dyndepth.export.reader import computed


def recomputed(folder: Path, record: dict[str, Any], model: str | None = None) -> dict[str, Tensor]:
    """``reader.computed`` of the method in the export ``folder``, attached to the model that lies
    there, or else to the one that the record names, or ``model`` in its place.

    Raises UserError if one of them cannot be loaded, or they do not belong together.
    """
    import torch

    from dyndepth.fitting.saved import load_method
    from dyndepth.models.loading import load_model
    from dyndepth.runtime.attach import attach

    job, base = record["job"], record["base"]
    torch.set_num_threads(job["threads"])
    inside = str(folder / record["model"]) if record["model"] else None
    revision = base["commit"] if inside is None and model is None else None
    loaded = load_model(
        model or inside or base["name"],
        dtype=job["dtype"],
        device=job["device"],
        attn_implementation=job["attn_implementation"],
        revision=revision,
    )
    with attach(loaded, load_method(folder)):
        return computed(loaded, job["windows"], job["steps"])


def main(words: list[str]) -> int:
    """``FOLDER RECORD RESULT``: write what is computed to ``RESULT``, safetensors."""
    from safetensors.torch import save_file

    record = json.loads(Path(words[1]).read_text(encoding="utf-8"))
    try:
        found = recomputed(Path(words[0]), record)
    except Exception as fault:  # the method's own files among them: whatever these do
        print(told(fault), file=sys.stderr)
        return 1
    save_file({name: each.contiguous() for name, each in found.items()}, words[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
