"""The page of what was run on GPUs, and the README's sentence on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyndepth.common.digests import harness_code
from dyndepth.gpu.report import Facts, never_run, page, read
from dyndepth.pages.blocks import Source

PAGE = Path("docs/gpu_status.md")

_BEFORE = """## Earlier: one H200, commit b50ac88

Before the present code, by hand, in November 2026 (driver 580, torch 2.11, transformers 5.17,
Python 3.12):

- The sweep `--methods skipgpt,early_exit,uls --device cuda --timing off` of the embedded model
  ran whole. The numbers of dense, skipgpt and uls agreed with those of the CPU within 1e-3
  relative. Early exit solves its threshold on the device: it achieved 1.26x where the CPU's
  achieved 1.25x.
- The conformance and runtime tests ran in float32 on four families: 571 passed. Training routers
  on standardised streams failed in 118 others, where CPU and GPU tensors met; that was mended
  since.
- Static plans on random weights in the shape of an 8B model, bfloat16: prefill of 8 x 2,048
  tokens 2.00 times as fast as dense, with 2.00 times fewer FLOPs. Nothing waited for the device.
- Token masks of 50% in prefill of 1 x 2,048 tokens 1.01 times as fast, where FLOPs allow 1.94;
  batched decoding under masks 0.72 of dense. Dense decoding took 20.5 ms a step in eager mode
  whatever the batch, and 7.0 ms as one CUDA graph: eager decoding of small batches measures the
  host.
- A prototype of what runs now (queries laid among zeros around the causal kernel, one wait a
  block; graphs a step or a block) reached 1.41 and 1.59 in prefill of 1 and 8 x 2,048 tokens
  under masks of 50%, and 1.35 over the dense graph in decoding one sequence."""


def records(root: Path) -> dict[str, Facts]:
    """The committed runs on GPUs by their folder, the latest first."""
    found = {
        file.parent.relative_to(root).as_posix(): read(file.parent)
        for file in sorted((root / "results").glob("*/gpu.json"))
    }
    whole = {folder: facts for folder, facts in found.items() if facts and not facts["small"]}
    return dict(sorted(whole.items(), key=lambda item: item[1]["date"], reverse=True))


def current(facts: Facts) -> bool:
    """Whether a run was of the code as it is."""
    return bool(facts["code"]["harness"] == harness_code())


def status_page(source: Source) -> str:
    """The whole page, but for the line that says what wrote it."""
    found = records(source.root)
    now = {folder: facts for folder, facts in found.items() if current(facts)}
    parts = [
        "# What was run on GPUs",
        "Several GPUs, several machines and models spread over GPUs have not been run on GPUs at "
        "all. `make gpu` (or `python -m dyndepth.gpu`) is ten minutes of a GPU; its folder under "
        "`results/` puts what held and what fell short on this page.",
    ]
    if not now:
        missing = "\n".join(f"- {each}" for each in never_run())
        parts.append(
            f"**The present code has not been run on a GPU.** So not known are:\n\n{missing}"
        )
    for folder, facts in found.items():
        age = "" if folder in now else " It is of older code."
        parts.append(f"{page(facts, '##').rstrip()}\n\nFrom `{folder}/`.{age}")
    return "\n\n".join([*parts, _BEFORE]) + "\n"


def sentence(source: Source, options: dict[str, Any]) -> str:
    """Whether the present code was run on a GPU, in a sentence. Option ``page``: the link."""
    link = f"[what was run on GPUs]({options['page']})"
    now = [facts for facts in records(source.root).values() if current(facts)]
    if not now:
        return f"The present code has not been run on a GPU yet ({link})."
    cards = " and ".join(sorted({facts["card"] for facts in now}))
    return f"The present code was run on {cards} ({link})."
