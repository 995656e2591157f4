"""Whatever the configuration, the gates, the shapes and the padding: sparse equals masked, cached
decode equals one forward, and the ledger equals torch's counter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, TOLERANCE, attentions, make_tiny
from gating import GivenPlan, RandomMask
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flops import counted

from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.limits import ALWAYS, Limits


@dataclass(frozen=True)
class Case:
    """One model, one method, one batch."""

    family: str
    attn: str
    changes: dict
    seed: int
    method: object
    limits: Limits
    lengths: list[int]
    side: str
    cuts: list[int]

    def batch(self):
        """Token ids, mask and positions, padded."""
        width = max(self.lengths)
        mask = torch.zeros(len(self.lengths), width, dtype=torch.long, device=DEVICE)
        for row, length in enumerate(self.lengths):
            mask[row, :length] = 1
        mask = mask.flip(1) if self.side == "left" else mask
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(3, 90, mask.shape, generator=generator).to(DEVICE)
        return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)

    def attached(self, model, **more):
        documents = [str(row) for row in range(len(self.lengths))]
        return attach(model, self.method, documents=documents, limits=self.limits, **more)


@st.composite
def cases(draw, family):
    layers = draw(st.integers(1, 4))
    heads = draw(st.sampled_from([2, 4]))
    changes = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": 32 // heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads])),
    }
    if family == "gemma3_text":
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        changes["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    if family == "smollm3":
        changes["no_rope_layers"] = draw(
            st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
        )
    if family in ("mistral", "gemma2", "gemma3_text", "phi3"):
        changes["sliding_window"] = draw(st.integers(2, 20))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    phases = draw(st.sampled_from(["both", "generation"]))
    gates = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=layers, max_size=layers)
    kind = draw(st.sampled_from(["masks", "static", "sequence"]))
    if kind == "masks":
        method = RandomMask(
            rate=draw(st.sampled_from([0.05, 0.5, 0.9])),
            sublayers=draw(st.sampled_from([(0,), (1,), (0, 1)])),
            seed=draw(st.integers(0, 9)),
            phases=phases,
        )
    elif kind == "static":
        method = GivenPlan(plan=tuple(draw(gates)), phases=phases)
    else:
        plans = {str(row): tuple(draw(gates)) for row in range(len(lengths))}
        method = GivenPlan(plan=plans, phases=phases)
    width = max(lengths)
    return Case(
        family,
        draw(st.sampled_from(attentions(family))),
        changes,
        draw(st.integers(0, 99)),
        method,
        draw(st.sampled_from([ALWAYS, Limits(0.5, 0.7, 6), Limits(0.9, 0.4, 0)])),
        lengths,
        draw(st.sampled_from(["left", "right"])),
        sorted(draw(st.sets(st.integers(1, width), max_size=3)) - {width}),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_is_masked_cached_is_whole_and_the_ledger_counts(family):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(cases(family))
    def holds(case):
        model = make_tiny(family, case.attn, seed=case.seed, **case.changes)
        ids, mask, positions = case.batch()
        real = mask.bool()
        given = {"attention_mask": mask, "position_ids": positions}
        # Tokens of the first part are the prompt, in each sequence as many as are real.
        first = case.cuts[0] if case.cuts else ids.shape[1]
        prompt = mask[:, :first].sum(1)
        logits = {}
        for backend in ("sparse", "masked"):
            with case.attached(model, backend=backend, prompt_length=prompt) as trace:
                work = counted(lambda: logits.__setitem__(backend, model(ids, **given).logits))  # noqa: B023
                if case.attn == "eager":
                    assert work == sum(trace.flops.values())
        torch.testing.assert_close(
            logits["sparse"][real], logits["masked"][real], atol=TOLERANCE, rtol=0
        )
        parts, past = [], None
        with case.attached(model) as trace:
            for start, stop in zip([0, *case.cuts], [*case.cuts, ids.shape[1]], strict=True):
                trace.prompt_length = prompt
                out = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    use_cache=True,
                    **{cache_argument(model): past},
                )
                past = cache_of(out)
                parts.append(out.logits)
        torch.testing.assert_close(
            torch.cat(parts, 1)[real], logits["sparse"][real], atol=TOLERANCE, rtol=0
        )

    holds()
