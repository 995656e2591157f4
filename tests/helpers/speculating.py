"""What the tests of speculation share: texts by the loop and by the stock model, compared."""

from __future__ import annotations

import torch
from conftest import DEVICE, TOLERANCE
from transformers import DynamicCache

from dyndepth.runtime.attach import attach
from dyndepth.runtime.speculation import speculate


def prompts(count, length=7, seed=1, vocabulary=90):
    """``count`` lists of tokens, each a little longer than the one before."""
    drawn = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocabulary, (length + n % 5,), generator=drawn).tolist()
        for n in range(count)
    ]


def dense(model, prompt, limit):
    """What the stock model writes greedily, by transformers' own loop."""
    ids = torch.tensor([prompt], device=DEVICE)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, **ENDLESS
    )
    return out[0, len(prompt) :].tolist()


ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


def drafted(model, trace, method, prompt, limit, **how):
    """What the loop writes, checking after each round that every layer holds all but the last."""
    cache = how.pop("cache", None) or DynamicCache()
    written = []
    for tokens in speculate(model, trace, method, prompt, limit=limit, cache=cache, **how):
        written += tokens
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert lengths == {len(prompt) + len(written) - 1}
        assert trace.drafting is False
    return written


def gap(model, prompt, want, found):
    """None where two texts are the same; else how far apart the logits of the two likeliest tokens
    are where they part, and the size of the larger."""
    if want == found:
        return None
    same = next(n for n, (a, b) in enumerate(zip(want, found, strict=True)) if a != b)
    ids = torch.tensor([prompt + want[:same]], device=DEVICE)
    best = model(ids).logits[0, -1].float().topk(2)
    assert {want[same], found[same]} == set(best.indices.tolist())
    return float(best.values[0] - best.values[1]), float(best.values[0].abs())


def parts(model, method, texts, limit, **how):
    """Drafts ``texts``, (prompt, what the stock model writes) each, in float32, where no two may
    part but at a tie; returns the trace."""
    with attach(model, method, **how) as trace:
        found = [drafted(model, trace, method, prompt, limit) for prompt, _ in texts]
    for (prompt, want), text in zip(texts, found, strict=True):
        apart = gap(model, prompt, want, text)
        assert apart is None or apart[0] <= TOLERANCE
    return trace
