"""Single blocks, run once more in the place of the last token that stands."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from recording import StandIn
from test_attach import ids
from test_flops import counted
from toys import Drafting
from transformers import DynamicCache

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import cache_argument
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.speculation import speculate

PROMPT = 12
"""More than the windows of the tiny models reach back."""


@dataclass(kw_only=True)
class Trying(Drafting):
    """Drafts ``right`` tokens by the whole model, then by none of it; tries ``rows`` in each block.

    Attributes:
        seen: of each verification: what it was told, the cache as it was then, and by block what
            it makes of the rows and of the token's own stream.
    """

    reads_states = True
    length: int = 3
    right: int = 1
    rows: object = None

    def __post_init__(self):
        super().__post_init__()
        self.cache, self.seen, self._drafted = DynamicCache(), [], 0

    def start(self, context):
        return torch.full((context.layers, 2), self._drafted < self.right)

    def more(self, draft):
        self._drafted = draft.length
        return super().more(draft)

    def verified(self, verdict):
        before = copy.deepcopy(self.cache)
        tried = []
        for layer in range(len(verdict.states) - 1):
            own = verdict.states[layer : layer + 1]
            rows = own if self.rows is None else torch.cat((own, self.rows.to(own)))
            tried.append(verdict.rerun(layer, rows))
        self.seen.append((verdict, before, torch.stack(tried)))
        for old, new in zip(before.layers, self.cache.layers, strict=True):
            assert torch.equal(old.keys, new.keys)
            assert torch.equal(old.values, new.values)


def write(model, method, limit=6, ends=lambda written: False, choice=None, **given):
    """The text, prompt included, by a method over its own cache; and the trace."""
    prompt = ids(1, PROMPT)[0].tolist()
    with attach(model, method, **given) as trace:
        how = {"limit": limit, "ends": ends, "choice": choice, "cache": method.cache}
        rounds = speculate(model, trace, method, prompt, **how)
        text = prompt + [token for tokens in rounds for token in tokens]
    return text, trace


def reference(model, cache, token, layer, stream):
    """What the stock block makes of a stream: a step of the whole model over a copy of the cache,
    with the stream put in at the block's entry."""
    cache, outs = copy.deepcopy(cache), []
    cache.crop(-1)
    block = Decoder.of(model).layers[layer]

    def put(module, args, kwargs):
        return (stream[None, None], *args[1:]), kwargs

    def keep(module, args, out):
        outs.append(out[0] if isinstance(out, tuple) else out)

    hooks = [
        block.register_forward_pre_hook(put, with_kwargs=True),
        block.register_forward_hook(keep),
    ]
    try:
        given = {cache_argument(model): cache, "use_cache": True}
        model(torch.tensor([[token]], device=stream.device), **given)
    finally:
        for hook in hooks:
            hook.remove()
    return outs[0][0, 0]


@variants()
def test_rows_equal_steps_of_the_stock_model_with_the_stream_put_in(tiny, family, attn):
    model = tiny(family, attn)
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    method = Trying(rows=rows)
    text, _ = write(model, method)
    held = PROMPT
    assert method.seen
    for verdict, cache, tried in method.seen:
        held += 1 + verdict.accepted
        assert cache.get_seq_length() == held
        for layer in range(4):
            for row, stream in enumerate((verdict.states[layer], *rows.to(verdict.states))):
                want = reference(model, cache, text[held - 1], layer, stream)
                torch.testing.assert_close(tried[layer, row], want, atol=TOLERANCE, rtol=0)


@variants()
def test_states_are_those_of_the_last_token_that_stands(tiny, family, attn):
    """Whether none, some or all of a draft stands."""
    model, parts, accepted = tiny(family, attn), None, set()
    for right in (0, 1, 3):
        method = Trying(right=right)
        text, _ = write(model, method)
        parts = Decoder.of(model)
        out = model(
            torch.tensor([text], device=parts.head.weight.device), output_hidden_states=True
        )
        held = PROMPT
        for verdict, _, tried in method.seen:
            held += 1 + verdict.accepted
            accepted.add(verdict.accepted)
            want = torch.stack([hidden[0, held - 1] for hidden in out.hidden_states])
            found = torch.cat((verdict.states[:-1], parts.norm(verdict.states[-1:])))
            torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(tried[:, 0], verdict.states[1:], atol=TOLERANCE, rtol=0)
    assert {1, 3} <= accepted


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_ledger_equals_counter(tiny, family, reads):
    model, traces = tiny(family, "eager"), []
    method = Trying(rows=torch.ones(2, 32)) if reads else Drafting(length=3)
    method.cache = DynamicCache()
    flops = counted(lambda: traces.append(write(model, method, documents=["a"])[1]))
    trace = traces[0]
    assert flops == sum(trace.flops.values())
    assert trace.flops["padding"] == 0
    totals = trace.by_document()["a"]
    assert totals["total_flops"] == flops
    assert totals["block_flops"] == totals["dense_block_flops"]


def test_a_rule_that_runs_the_model_bears_nothing_of_it(tiny):
    """What is run again is billed to the verification, not to what ran last."""
    model, again = tiny(), ids(1, 2)

    def rule(tokens, logits):
        model(again)
        return logits.clone()

    spent = []
    for choice in (Choice(), Choice(rule)):
        method = Trying(right=1, length=3)
        _, trace = write(model, method, choice=choice)
        assert any(len(each.drafted) > 1 for each in trace.speculation.rounds)
        spent.append(trace.totals("generation")["by_cause"]["draft"])
    assert spent[0] == spent[1]


def test_a_text_that_ends_inside_a_draft(tiny):
    """What was drafted beyond its end is no more in the cache."""
    model, method = tiny(), Trying(right=3)
    text, _ = write(model, method, limit=12, ends=lambda written: len(written) == 4)
    (verdict, cache, _), *_ = method.seen
    assert (verdict.accepted, len(text) - PROMPT, cache.get_seq_length()) == (3, 4, PROMPT + 3)
    method = Trying(right=3)
    text, _ = write(model, method, limit=12, ends=lambda written: len(written) == 3)
    (verdict, cache, tried), *_ = method.seen
    assert (verdict.accepted, len(text) - PROMPT, cache.get_seq_length()) == (3, 3, PROMPT + 2)
    want = reference(model, cache, text[PROMPT + 1], 0, verdict.states[0])
    torch.testing.assert_close(tried[0, 0], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("how", ["uncounted", "masked", "graphs"])
def test_however_the_method_is_attached(tiny, how):
    model, plain, method = tiny(), Trying(rows=torch.ones(2, 32)), Trying(rows=torch.ones(2, 32))
    text, _ = write(model, plain)
    if how == "graphs":
        if DEVICE.type == "standin":
            pytest.skip("not recorded")
        with Graphs(StandIn() if DEVICE.type == "cpu" else None) as graphs:
            assert write(model, method, mode=graphs)[0] == text
            assert graphs.steps
    else:
        given = {"count": False} if how == "uncounted" else {"backend": "masked"}
        assert write(model, method, **given)[0] == text
    for (_, _, want), (_, _, tried) in zip(plain.seen, method.seen, strict=True):
        torch.testing.assert_close(tried, want, atol=TOLERANCE, rtol=0)


def test_each_round_tells_how_many_blocks_were_run_again(tiny):
    text, trace = write(tiny(), Trying(length=3, right=3), limit=6)
    # The first token is the prompt's, four are a round's; then nothing is left to draft and to try.
    told = [(len(each.drafted), each.reran) for each in trace.speculation.rounds]
    assert told == [(3, 4), (0, 0)]  # of four blocks


def test_it_holds_until_verified_returns(tiny):
    method = Trying()
    write(tiny(), method)
    with pytest.raises(MethodFault, match="until `verified` returns"):
        method.seen[0][0].rerun(0, torch.zeros(1, 32))


def test_rows_of_another_shape_are_refused(tiny):
    for rows in (torch.zeros(1, 33), torch.zeros(32), torch.zeros(1, 1, 32)):
        method = Trying()
        method.verified = lambda verdict, rows=rows: verdict.rerun(0, rows)
        with pytest.raises(MethodFault, match=r"takes rows \[n, 32\], here \["):
            write(tiny(), method)


def test_who_reads_no_states_gets_none(tiny):
    told, method = [], Drafting()
    method.cache, method.verified = DynamicCache(), told.append
    write(tiny(), method)
    assert told
    assert all(each.states is None and each.rerun is None for each in told)


def test_a_kernel_without_such_masks_is_refused(tiny):
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2"), attach(model, Trying()):
        pass
