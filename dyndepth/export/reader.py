"""Reads a checkpoint and says what it computes: run as a script, in a process of its own.

As a script it imports nothing of the project, and lets nothing else import it: what it finds is
what anybody's ``from_pretrained`` gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROJECT = "dyndepth"


def computed(model: Any, windows: list[list[int]], steps: int) -> dict[str, Any]:
    """What ``model`` computes of ``windows``, token ids of one length.

    Returns, on the CPU, ``logits`` of one full forward, float32 ``[windows, tokens, vocabulary]``;
    ``generated``, the tokens that greedy decoding over a cache adds, int64 ``[windows, steps]``;
    and ``step_logits``, those by which it chose them, float32 ``[windows, steps, vocabulary]``.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor(windows, device=device)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=steps,
            min_new_tokens=steps,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return {
        "logits": logits,
        "generated": out.sequences[:, ids.shape[1] :].cpu(),
        "step_logits": torch.stack(out.logits, 1).float().cpu(),
    }


def main(words: list[str]) -> int:
    """``FOLDER JOB RESULT``, any number of times: load the model in ``FOLDER``, do what ``JOB``
    (JSON) says, write what is computed to ``RESULT`` (safetensors) and a line of JSON to stdout."""
    for first in range(0, len(words), 3):
        print(json.dumps(_read(*words[first : first + 3])), flush=True)
    return 0


def _read(source: str, asked: str, result: str) -> dict[str, Any]:
    """Settings as they are read, what the loader complains of, and whether the project is here."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(Path(asked).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, job["dtype"]),
        attn_implementation=job["attn_implementation"],
        output_loading_info=True,
        local_files_only=True,
    )
    model, report = loaded
    model.eval().to(job["device"])
    if job["tokenizer"]:
        AutoTokenizer.from_pretrained(source, local_files_only=True)
    found = computed(model, job["windows"], job["steps"])
    save_file({name: each.contiguous() for name, each in found.items()}, result)
    return {
        "settings": {name: getattr(model.config, name, None) for name in job["settings"]},
        "loader": {key: sorted(map(str, value)) for key, value in report.items() if value},
        "imported": PROJECT in sys.modules,
    }


class _Stranger:
    """Has the project be no package here."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.partition(".")[0] == PROJECT:
            raise ModuleNotFoundError(f"{name} is not to be had in this process", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Stranger())
    sys.exit(main(sys.argv[1:]))
