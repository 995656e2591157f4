"""What holds for each family, found by running it; written into docs/families.md.

``make docs`` writes the matrix by it, ``test_families.py`` runs the same checks and compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import DEVICE, attentions, make_tiny
from gating import GivenPlan, RandomMask, plan_without

from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.limits import ALWAYS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TOLERANCE = 1e-5
IMPLEMENTATIONS = ("sdpa", "eager")
_PLAN = GivenPlan(plan=plan_without(4, (0, 0), (0, 1), (2, 0), (3, 1)))


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5)).to(
        DEVICE
    )


def _gap(model: Any, method: Any) -> float:
    """The sparse backend against computing all and multiplying."""
    tokens, logits = _ids(3, 13), []
    for backend in ("sparse", "masked"):
        with attach(model, method, backend=backend, limits=ALWAYS):
            logits.append(model(tokens).logits)
    return float((logits[0] - logits[1]).abs().max())


def dense(model: Any) -> bool:
    """With every gate open: the stock model's logits bit for bit."""
    tokens = _ids(3, 13)
    with attach(model, RandomMask(rate=1.0)):
        attached = model(tokens).logits
    return torch.equal(attached, model(tokens).logits)


def static(model: Any) -> bool:
    """A plan without the first block, one attention and one MLP."""
    return _gap(model, _PLAN) <= TOLERANCE


def masks(model: Any) -> bool:
    """Random gates for each token and sublayer."""
    return _gap(model, RandomMask()) <= TOLERANCE


def generate(model: Any) -> bool:
    """Greedy generation over a cache, left-padded batch: each token is the recomputed one."""
    tokens, mask = _ids(3, 9), torch.ones(3, 9, dtype=torch.long, device=DEVICE)
    mask[1, :3] = mask[2, :6] = 0
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for method in (_PLAN, RandomMask()):
        with attach(model, method, limits=ALWAYS) as trace:
            out = model.generate(tokens, attention_mask=mask, **given)
            for row in range(3):
                real = torch.cat((tokens[row, mask[row].bool()], out[row, 9:]))[None]
                trace.prompt_length = real.shape[1] - 5
                logits = model(real).logits[0, -6:-1]
                logits[:, model.generation_config.eos_token_id] = -torch.inf
                if not torch.equal(logits.argmax(-1), out[row, 9:]):
                    return False
            trace.prompt_length = None
    return True


CHECKS: dict[str, Callable[[Any], bool]] = {
    "dense, bit for bit": dense,
    "static plans": static,
    "token masks": masks,
    "generate": generate,
}


def found(family: str) -> dict[str, dict[str, bool]]:
    """By check and attention implementation, whether it holds."""
    models = {attn: make_tiny(family, attn) for attn in attentions(family)}
    return {
        name: {attn: check(model) for attn, model in models.items()}
        for name, check in CHECKS.items()
    }


def version() -> str:
    """The first two numbers of transformers' version: with others a class may have less."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def table(results: dict[str, dict[str, dict[str, bool]]]) -> str:
    """The matrix as Markdown: where a check holds, the implementations that it holds with."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    lines = [
        f"| family | class in transformers {version()} | {' | '.join(CHECKS)} |",
        "|---" * (2 + len(CHECKS)) + "|",
    ]
    for family, checks in sorted(results.items()):
        cells = [", ".join(a for a, held in checks[name].items() if held) for name in CHECKS]
        lines.append(f"| {family} | {NAMES[family]} | {' | '.join(c or 'no' for c in cells)} |")
    return "\n".join(lines)


def placed(page: str, matrix: str) -> str:
    """The page with the matrix between its marks."""
    marks = r"(<!-- matrix -->\n).*(<!-- /matrix -->)"
    return re.sub(marks, lambda m: f"{m[1]}{matrix}\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    """Write the matrix."""
    matrix = table({family: found(family) for family in FAMILIES})
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), matrix), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
