"""What is kept with a cache belongs to its sequences, whatever is done to them in between."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from recording import StandIn
from test_attach import ids, incremental, padded
from toys import ByAge, Counting, Remembering
from transformers import DynamicCache, StaticCache

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.evaluation.forwards import joined, rows_of
from dyndepth.evaluation.generation import Prompt, generate
from dyndepth.evaluation.scoring import Group, score, score_alone
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs

PHASES = pytest.mark.parametrize("phases", ["generation", "both"])
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def methods(phases="both"):
    return [Remembering(phases=phases), ByAge(phases=phases)]


every_method = pytest.mark.parametrize("which", [0, 1])


@every_method
@PHASES
@variants()
def test_cached_steps_equal_one_forward(tiny, family, attn, which, phases):
    model, method = tiny(family, attn), methods(phases)[which]
    tokens = ids(3, 13)
    with attach(model, method) as trace:
        by_token = incremental(model, tokens, prompt=6)
        by_chunk = incremental(model, tokens, prompt=6, chunk=3)
        trace.prompt_length = 6
        whole = model(tokens).logits
        executed = trace.gates()
    torch.testing.assert_close(by_token, whole, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(by_chunk, whole, atol=TOLERANCE, rtol=0)
    assert (executed[:, :6].all().item()) == (phases == "generation")
    assert not executed[:, 6:].all()
    if (which, family) == (0, "llama"):
        assert (executed[0] != executed[1:]).any()  # sequences differ


@every_method
@PHASES
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_as_alone(tiny, which, phases, side):
    """Prompts of different lengths, by a mask; then steps over their cache."""
    model, method = tiny(), methods(phases)[which]
    tokens, mask, _ = padded(side)
    more = ids(3, 4, seed=2)
    name = cache_argument(model)

    def run(tokens, mask, more):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
        found = []
        for start, stop in ((0, 1), (1, 4)):
            new = more[:, start:stop]
            mask = torch.cat((mask, torch.ones_like(new)), 1)
            positions = (mask.cumsum(1) - 1)[:, -new.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions, name: cache_of(out)}
            out = model(new, use_cache=True, **given)
            found.append(out.logits)
        return torch.cat(found, 1)

    with attach(model, method):
        batch = run(tokens, mask, more)
        for row in range(3):
            real = mask[row].bool()
            alone = run(tokens[row : row + 1, real], mask[row : row + 1, real], more[row : row + 1])
            torch.testing.assert_close(batch[row : row + 1], alone, atol=TOLERANCE, rtol=0)


def expected(model, method, prompt, sequence):
    """Greedy logits at each generated token, from one forward over all of them."""
    with attach(model, method, prompt_length=len(prompt), warn=False):
        return model(sequence[None]).logits[0, len(prompt) - 1 : -1]


@every_method
@PHASES
def test_generate_beams_and_returned_sequences(tiny, which, phases):
    """A batch with beams is each sequence with beams, and greedy tokens are those of one forward
    over all; what a beam's row keeps is its own sequence's."""
    model, method = tiny(), methods(phases)[which]
    tokens, mask, _ = padded("left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6}
    with attach(model, method):
        greedy = model.generate(tokens, attention_mask=mask, **GREEDY)
        together = model.generate(tokens, attention_mask=mask, **beams)
        for row in range(3):
            own = tokens[row : row + 1, mask[row].bool()]
            alone = model.generate(own, **beams)[:, own.shape[1] :]
            assert torch.equal(together[2 * row : 2 * row + 2, 12:], alone)
    for row in range(3):
        prompt = tokens[row, mask[row].bool()]
        logits = expected(model, method, prompt, torch.cat((prompt, greedy[row, 12:])))
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), greedy[row, 12:])


@pytest.mark.parametrize("method", [*methods(), Counting()], ids=lambda each: each.name)
def test_generations_that_take_turns(tiny, method):
    """Two caches on one attached model, a step each in turn, and one that joins late."""
    model, name = tiny(), cache_argument(tiny())
    texts = [ids(2, 11), ids(2, 11, seed=1), ids(2, 9, seed=2)]
    with attach(model, method):
        alone = [incremental(model, each, prompt=5 + n) for n, each in enumerate(texts)]
        outs = [model(each[:, : 5 + n], use_cache=True) for n, each in enumerate(texts)]
        for step in range(2):
            for n, text in enumerate(texts):
                place = 5 + n + step
                past = {name: cache_of(outs[n])}
                outs[n] = model(text[:, place : place + 1], use_cache=True, **past)
                torch.testing.assert_close(
                    outs[n].logits[:, 0], alone[n][:, place], atol=TOLERANCE, rtol=0
                )


@pytest.mark.parametrize("make", [lambda _: DynamicCache(), lambda c: DynamicCache(config=c)])
@pytest.mark.parametrize("method", [*methods("generation"), Counting()], ids=lambda m: m.name)
def test_caches_are_cropped_copied_selected_and_reordered(tiny, method, make):
    model, past = tiny(), make(tiny().config)
    name, tokens = cache_argument(model), ids(2, 12)
    order = torch.tensor([1, 0, 1], device=DEVICE)
    with attach(model, method) as trace:
        model(tokens[:, :5], **{name: past})
        model(tokens[:, 5:7], **{name: past})
        kept = copy.deepcopy(past)
        want = model(tokens[:, 7:9], **{name: past}).logits
        if method.name != "counting":  # forwards that are cropped were forwards
            past.crop(-2)
            again = model(tokens[:, 7:9], **{name: past}).logits
            torch.testing.assert_close(again, want, atol=TOLERANCE, rtol=0)
        chosen = rows_of(kept, order)
        found = model(tokens[order, 7:9], **{name: chosen}).logits
        torch.testing.assert_close(found, want[order], atol=TOLERANCE, rtol=0)
        chosen = copy.deepcopy(kept)
        chosen.reorder_cache(order[:2])
        found = model(tokens[order[:2], 7:9], **{name: chosen}).logits
        torch.testing.assert_close(found, want[order[:2]], atol=TOLERANCE, rtol=0)
        chosen.batch_select_indices(order[:1])
        chosen.batch_repeat_interleave(2)
        assert torch.equal(chosen.layers[1].keys[0], chosen.layers[1].keys[1])
        model(tokens[:, 9:10], **{name: chosen})
        assert trace.gates()[0].equal(trace.gates()[1])
        # What was selected from is as it was.
        found = model(tokens[:, 7:9], **{name: kept}).logits
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
        past.reset()
        prompt = model(tokens[:, :5], **{name: past}).logits
        fresh = model(tokens[:, :5]).logits
        torch.testing.assert_close(prompt, fresh, atol=TOLERANCE, rtol=0)


def seen_by(method, model):
    """What the method is told of each token's age, by forwards."""

    @dataclass(kw_only=True)
    class Told(type(method)):
        def start(self, context):
            told.append(context.generated.tolist())
            return super().start(context)

    told: list = []
    return Told(phases="both"), told


def test_ages_of_tokens(tiny):
    """Of one forward, steps, chunks, cropped caches, and caches filled before anything was
    attached; with padding on either side and with lengths that callers give."""
    model = tiny()
    method, told = seen_by(ByAge(), model)
    name, tokens = cache_argument(model), ids(2, 12)
    filled = cache_of(model(tokens[:, :4], use_cache=True))
    with attach(model, method) as trace:
        model(tokens[:, 4:6], **{name: filled})
        assert told.pop() == [[0, 1]] * 2
        filled.crop(-3)  # two that were generated and one of the prompt
        model(tokens[:, 3:5], **{name: filled})
        assert told.pop() == [[0, 1]] * 2
        model(tokens[:, 5:6], **{name: filled})
        assert told.pop() == [[2]] * 2
        trace.prompt_length = torch.tensor([3, 5])
        past = cache_of(model(tokens[:, :6], use_cache=True))
        assert told.pop() == [[0, 0, 0, 0, 1, 2], [0] * 6]
        trace.prompt_length = None
        past.reorder_cache(torch.tensor([1, 0]))
        model(tokens[:, 6:8], **{name: past})
        assert told.pop() == [[1, 2], [3, 4]]
        trace.prompt_length = 4
        mask = torch.ones(2, 6, dtype=torch.long, device=DEVICE)
        mask[0, :3] = 0
        past = cache_of(model(tokens[:, :6], attention_mask=mask, use_cache=True))
        assert told.pop() == [[0] * 6, [0, 0, 0, 0, 0, 1]]
        trace.prompt_length = None
        mask = torch.cat((mask, mask[:, -2:]), 1)
        model(tokens[:, 6:8], attention_mask=mask, **{name: past})
        assert told.pop() == [[0, 1], [2, 3]]  # the first had three tokens
        # A shared beginning, the rest of a prompt over it, and what follows.
        past = cache_of(model(tokens[:, :3], use_cache=True))
        trace.prompt_length = torch.tensor([5, 5])
        model(tokens[:, 3:5], **{name: past})
        trace.prompt_length = None
        told.clear()
        model(tokens[:, 5:7], **{name: past})
        assert told == [[[0, 1]] * 2]


@every_method
def test_scoring_and_generating(tiny, which):
    """Batches of unequal contexts, joined and selected: as one by one, without a cache."""
    model, method = tiny(), methods()[which]
    groups = [
        Group("a", [5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]),
        Group("b", [20, 21, 22], [[23, 24, 25, 26]]),
        Group("c", [20, 31, 32, 12], [[23, 24, 25, 26]]),
    ]
    prompts = [Prompt("a", [5, 6, 7, 8], 6, lambda _: False), Prompt("b", [20, 21], 3, bool)]
    with attach(model, method) as trace:
        found = dict(score(model, trace, groups, batch_size=2))
        for index, group in enumerate(groups):
            alone = score_alone(model, trace, group)
            assert [log for log, _ in found[index]] == pytest.approx(
                [log for log, _ in alone], abs=1e-4
            )
        both = dict(generate(model, trace, prompts, batch_size=2))
        assert both == {
            number: dict(generate(model, trace, [prompt], batch_size=1))[0]
            for number, prompt in enumerate(prompts)
        }


def test_caches_with_different_memories_are_not_joined(tiny):
    model, masks, caches = tiny(), [], []
    for method, length in ((Remembering(), 5), (Remembering(), 3), (Counting(), 4)):
        with attach(model, method):
            caches.append(cache_of(model(ids(1, length), use_cache=True)))
        masks.append(torch.ones(1, length, dtype=torch.long, device=DEVICE))
    _, whole = joined(masks[:2], caches[:2])
    runs = [each._dyndepth_kept.memory["runs"] for each in (*caches[:2], whole)]
    assert torch.equal(torch.cat(runs[:2]), runs[2])
    assert whole._dyndepth_kept.prompt == 5
    assert joined(masks[1:], caches[1:]) is None
    with attach(model, Remembering()):
        name = cache_argument(model)
        model(ids(1, 1), **{name: caches[0]})
    masks[0] = torch.ones(1, 6, dtype=torch.long, device=DEVICE)
    assert joined(masks[:2], caches[:2]) is None  # one has generated a token


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "method", [*methods("generation"), *methods(), Counting()], ids=lambda each: each.name
)
def test_steps_by_graphs_equal_eager_steps(tiny, method, batch):
    model, tokens = tiny(), ids(batch, 12)
    recorder = StandIn() if DEVICE.type == "cpu" else None
    with torch.inference_mode():
        with attach(model, method) as eager:
            want = incremental(model, tokens, prompt=5)
        with Graphs(recorder) as graphs, attach(model, method, mode=graphs) as trace:
            found = incremental(model, tokens, prompt=5)
            assert (graphs.steps, graphs.others) == (7, 0)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    assert trace.by_document() == eager.by_document()


@pytest.mark.parametrize("reentrant", [False, True])
@every_method
def test_gradient_checkpointing_changes_nothing(tiny, which, reentrant):
    model, method = tiny(), methods()[which]
    model.requires_grad_(True).train()
    gradients = []
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with attach(model, method, prompt_length=6):
            model(ids(2, 10), use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_a_prompt_that_is_only_read_runs_in_full(tiny, backend):
    model, tokens = tiny(), ids(2, 8)
    for method in (Remembering(phases="generation"), Remembering()):
        with attach(model, method, backend=backend, warn=False) as trace:
            logits = model(tokens).logits
        assert torch.equal(logits, model(tokens).logits) == (method.phases == "generation")
        assert (trace.executed() == 1).all() == (method.phases == "generation")


def test_nothing_is_kept_without_a_cache_and_none_is_asked_for(tiny):
    model, asked = tiny(), []

    class Seeing(Remembering):
        def start(self, context):
            asked.append(dict(context.memory))
            return super().start(context)

    with attach(model, Seeing(), warn=False):
        model(ids(2, 5), use_cache=False)
        model(ids(2, 5), use_cache=False)
        out = model(ids(2, 5), return_dict=False, use_cache=True)
        model(ids(2, 1), **{cache_argument(model): out[1]}, return_dict=False)
    assert [set(each) for each in asked] == [set(), set(), set(), {"runs"}]
    plain = tiny()
    with attach(plain, ByAge()):
        cache = cache_of(plain(ids(2, 5), use_cache=True))
    assert type(cache) is DynamicCache  # a method that writes nothing leaves the class alone
    static = StaticCache(config=model.config, max_cache_len=16)
    with attach(model, Counting()):
        name = cache_argument(model)
        model(ids(2, 5), **{name: static})
        model(ids(2, 1), **{name: static})
    assert static._dyndepth_kept.memory["forwards"].tolist() == [2, 2]


class Wrong(DynamicDepthMethod):
    """Keeps what it was made with."""

    name = "wrong"
    granularity = "token"
    paper = "test"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def start(self, context):
        context.memory["x"] = self.value

    def gates(self, layer, hidden):
        return True, True


@pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor(1.0), 7])
def test_what_is_not_of_the_sequences_is_refused(tiny, value):
    model = tiny()
    with attach(model, Wrong(value)), pytest.raises(MethodFault, match=r"sequences, here 2.*'x'"):
        model(ids(2, 5))


def test_a_cache_whose_rows_were_changed_by_hand_is_refused(tiny):
    model = tiny()
    with attach(model, Counting()):
        cache = cache_of(model(ids(2, 5), use_cache=True))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]
        with pytest.raises(UserError, match="of 2 sequences, and the forward has 1"):
            model(ids(1, 1), **{cache_argument(model): cache})
