"""Steps that are repeated from recordings are the steps that eager mode takes.

On a CPU the recordings are a stand-in's, which refuses what a capture refuses.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, TOLERANCE
from gating import GivenPlan, RandomMask, plan_without
from recording import Refused, StandIn
from test_attach import METHODS, ids, incremental, padded
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.runtime import graphs as module
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs, Share, obstacle
from dyndepth.runtime.lanes import bucket
from dyndepth.timing.jobs import given

RECORDED = ["llama", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "gpt_neox", "gpt2", "opt"]
PLAIN = {"mistral": {"sliding_window": None}, "phi3": {"sliding_window": None}}


@dataclass(kw_only=True)
class Reading(DynamicDepthMethod):
    """Gates that read the stream, by a table that stays where it is; bills for what they read."""

    name = "reading"
    granularity = "token"
    paper = "test"
    capturable = True

    shift: float = 0.0
    layers_kept: tuple[int, ...] = ()

    def start(self, context):
        self.context = context
        if "table" not in self.tensors:
            shape = (context.layers, 32, 2)
            table = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
            self.tensors["table"] = table.to(context.device)

    def gates(self, layer, hidden):
        self.context.bill("router", 128.0, None)
        if layer in self.layers_kept:
            return True, False
        execute = hidden @ self.tensors["table"][layer] >= self.shift
        return execute[..., 0], execute[..., 1]


ROUTED = {
    "reading": Reading(),
    "mostly": Reading(shift=-4.0),
    "seldom": Reading(shift=4.0),
    "some_known": Reading(layers_kept=(0, 2)),
}


def recorder():
    return StandIn() if DEVICE.type == "cpu" else None


@pytest.fixture
def model(tiny):
    return tiny()


def both(model, method, tokens, prompt=6, **how):
    """Logits and ledgers in eager mode and by graphs; the graphs, which repeated every step."""
    with torch.inference_mode():
        with attach(model, method, **how) as eager:
            want = incremental(model, tokens, prompt)
        with Graphs(recorder()) as graphs, attach(model, method, mode=graphs, **how) as trace:
            found = incremental(model, tokens, prompt)
            assert (graphs.steps, graphs.others) == (tokens.shape[1] - prompt, 0)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    return eager, trace


def same_ledgers(first, second):
    for key in ("tokens", "block_flops", "total_flops", "dense_block_flops", "dense_total_flops"):
        assert first.totals()[key] == second.totals()[key], key
    useful = [{k: v for k, v in each.flops.items() if k != "padding"} for each in (first, second)]
    assert useful[0] == useful[1]
    assert first.by_document() == second.by_document()
    assert torch.equal(first.executed("generation"), second.executed("generation"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*METHODS, *ROUTED])
@pytest.mark.parametrize("family", [*RECORDED, *PLAIN])
def test_steps_equal_eager_steps(tiny, family, name, batch):
    model = tiny(family, **PLAIN.get(family, {}))
    method = (METHODS | ROUTED)[name]
    eager, trace = both(model, method, ids(batch, 14), documents=["a", "b", "c"][:batch])
    same_ledgers(eager, trace)
    assert torch.equal(eager.gates(), trace.gates())


def test_every_family_is_recorded_or_says_why_not(tiny):
    for family in FAMILIES:
        reason = obstacle(Decoder.of(tiny(family, **PLAIN.get(family, {}))))
        assert (reason is None) == (family in RECORDED or family in PLAIN), (family, reason)


@pytest.mark.parametrize("name", ["masks", "scattered", "by_document_generation", "reading"])
def test_generate_with_left_padding(model, name):
    """Padding, positions and a cache that generation makes by itself."""
    tokens, mask, _ = padded("left")
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    method, documents = (METHODS | ROUTED)[name], ["a", "b", "c"]
    with attach(model, method, documents=documents):
        want = model.generate(tokens, **how)
    with Graphs(recorder()) as graphs:
        with attach(model, method, documents=documents, mode=graphs):
            found = model.generate(tokens, **how)
        assert (graphs.steps, graphs.others) == (5, 0)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(want.logits), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("name", ["scattered", "masks"])
def test_beams_crops_and_caches_in_turn(model, name):
    """A cache that is reordered, cropped or left for another is what it would be."""
    method, keyword = METHODS[name], cache_argument(model)
    tokens, other = ids(2, 16), ids(2, 16, seed=1)

    def alternating():
        found, caches = [], []
        for each in (tokens, other):
            caches.append(cache_of(model(each[:, :6], use_cache=True)))
        for step in (6, 7, 8):
            for each, cache in zip((tokens, other), caches, strict=True):
                token = each[:, step : step + 1]
                found.append(model(token, **{keyword: cache}, use_cache=True).logits)
        caches[0].crop(-2)
        copied = copy.deepcopy(caches[0])
        for cache in (caches[0], copied, caches[1]):
            cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
            found.append(model(tokens[:, 9:10], **{keyword: cache}, use_cache=True).logits)
        # Several tokens at once, which are no step, and then steps again.
        found.append(model(tokens[:, 10:13], **{keyword: caches[0]}, use_cache=True).logits)
        found.append(model(tokens[:, 13:14], **{keyword: caches[0]}, use_cache=True).logits)
        return torch.cat([each.flatten() for each in found])

    with torch.inference_mode():
        with attach(model, method):
            want = alternating()
        with Graphs(recorder()) as graphs, attach(model, method, mode=graphs):
            found = alternating()
            assert (graphs.steps, graphs.others) == (10, 1)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


def test_beam_search(model):
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with attach(model, METHODS["masks"], documents=["a", "b"]):
        want = model.generate(ids(2, 7), **how)
    with (
        Graphs(recorder()) as graphs,
        attach(model, METHODS["masks"], documents=["a", "b"], mode=graphs),
    ):
        assert torch.equal(model.generate(ids(2, 7), **how), want)
        assert graphs.steps > 0


def test_recordings_outlive_attachments_and_are_let_go(model):
    """Kept by method, plan, batch and length; a plan's are anybody's."""
    dense, plan = GivenPlan(plan=plan_without(4)), METHODS["scattered"]
    own = StandIn()
    if DEVICE.type != "cpu":
        own = None
    with Graphs(own) as graphs, torch.inference_mode():
        for _ in range(2):
            for method in (dense, plan, given(torch.ones(4, 2, dtype=torch.bool))):
                with attach(model, method, mode=graphs):
                    incremental(model, ids(1, 9), 6)
        assert len(graphs._recorded) == 2  # the third is dense as well
        with attach(model, plan, mode=graphs):
            incremental(model, ids(2, 9), 6)
        assert len(graphs._recorded) == 3
    assert not graphs._recorded
    assert not graphs._lanes


def test_lengths_beyond_the_buffers(model):
    """A cache that outgrows its bucket gets another; what it held is kept."""
    assert [bucket(n) for n in (1, 256, 257, 2048, 2049, 4608, 4609)] == [
        256, 256, 512, 2048, 2304, 4608, 5120
    ]  # fmt: skip
    tokens = ids(1, 255 + 4)
    model.config.max_position_embeddings = 512
    both(model, METHODS["scattered"], tokens, prompt=253)
    both(model, ROUTED["reading"], tokens, prompt=253)


def test_what_is_found_pays_or_is_multiplied(model, monkeypatch):
    """Where most is executed, the whole step is repeated and masks are multiplied; both are exact,
    and both count the same."""
    tokens = ids(1, 20)
    for limit in (0.0, 2.0):
        monkeypatch.setattr(module, "PAYS_BELOW", limit)
        eager, trace = both(model, ROUTED["reading"], tokens)
        same_ledgers(eager, trace)
    assert not Share(batch=2).pieces_pay
    share = Share(batch=1)
    assert share.pieces_pay
    for _ in range(40):
        share.add(2.0)
    monkeypatch.setattr(module, "PAYS_BELOW", 0.8)
    assert not share.pieces_pay
    for _ in range(40):
        share.add(0.1)
    assert share.pieces_pay


def test_a_method_that_was_fitted_anew_is_recorded_anew(model):
    method = Reading()
    tokens = ids(1, 12)
    with Graphs(recorder()) as graphs, torch.inference_mode():
        with attach(model, method, mode=graphs):
            incremental(model, tokens, 6)
        method.tensors = {"table": -method.tensors["table"]}
        with attach(model, method, mode=graphs):
            found = incremental(model, tokens, 6)
        with attach(model, method):
            want = incremental(model, tokens, 6)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("change", ["weight", "module"])
def test_a_model_that_was_changed_is_recorded_anew(model, change):
    """Between attachments: weights that lie elsewhere, and modules in the place of others."""
    tokens, method = ids(1, 10), METHODS["scattered"]
    with Graphs(recorder()) as graphs, torch.inference_mode():
        with attach(model, method, mode=graphs):
            before = incremental(model, tokens, 6)
        mlp = model.model.layers[3].mlp
        with torch.inference_mode(False):
            if change == "weight":
                mlp.down_proj.weight = torch.nn.Parameter(-mlp.down_proj.weight, False)
            else:
                model.model.layers[3].mlp = copy.deepcopy(mlp).requires_grad_(False)
                model.model.layers[3].mlp.down_proj.weight.neg_()
        with attach(model, method, mode=graphs):
            found = incremental(model, tokens, 6)
            assert graphs.others == 0
        with attach(model, method):
            want = incremental(model, tokens, 6)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(found, before, atol=1e-2)


def test_forwards_that_are_no_plain_step_run_as_ever(model):
    """What a recording leaves out is not left out."""
    tokens, keyword = ids(1, 9), cache_argument(model)
    with Graphs(recorder()) as graphs, attach(model, METHODS["scattered"], mode=graphs):
        with torch.no_grad():
            cache = cache_of(model(tokens[:, :6], use_cache=True))
            step = {keyword: cache, "use_cache": True}
            out = model(tokens[:, 6:7], output_hidden_states=True, **step)
            assert len(out.hidden_states) == 5
            embedded = model.get_input_embeddings()(tokens[:, 7:8])
            model(inputs_embeds=embedded, **step)
        model(tokens[:, 8:9], **step)  # with gradients
        assert (graphs.steps, graphs.others) == (0, 3)
        with torch.no_grad():
            model.train()(tokens[:, 8:9], **step)
            model.eval()
        assert (graphs.steps, graphs.others) == (0, 4)
        seen = []
        with torch.no_grad():
            model(tokens[:, :1], **step)
            assert graphs.steps == 1
            handle = model.model.layers[3].mlp.register_forward_hook(lambda *_: seen.append(1))
            cache = cache_of(model(tokens[:, :6], use_cache=True))
            model(tokens[:, 6:7], **{keyword: cache}, use_cache=True)
            handle.remove()
        assert graphs.steps == 1
        assert seen


def test_refusals(model, tiny):
    plan = METHODS["scattered"]
    with pytest.raises(UserError, match="mode must be 'eager' or 'graphs', not 'fast'"):
        enter(model, plan, mode="fast")
    with pytest.raises(UserError, match="of the backend 'sparse'"):
        enter(model, plan, mode=Graphs(recorder()), backend="masked")
    with pytest.raises(UserError, match="attention is 'eager', not 'sdpa'"):
        enter(tiny("llama", "eager"), plan, mode=Graphs(recorder()))
    with pytest.raises(UserError, match="through a window"):
        enter(tiny("mistral"), plan, mode=Graphs(recorder()))
    if DEVICE.type == "cpu":
        with pytest.raises(UserError, match="graphs need a CUDA device"):
            enter(model, plan, mode="graphs")
    graphs = Graphs(recorder())
    enter(model, plan, mode=graphs)
    with pytest.raises(UserError, match="another model's"):
        enter(tiny(), plan, mode=graphs)
    graphs.close()
    enter(tiny(), plan, mode=graphs)


def enter(model, method, **how):
    with attach(model, method, **how):
        pass


class Peeking(Reading):
    """Says that it can be recorded, and asks the device for a value."""

    def gates(self, layer, hidden):
        first, second = super().gates(layer, hidden)
        return bool(first.all()), second


class Choosy(Reading):
    """Says that it can be recorded, and bills for some of the tokens."""

    def gates(self, layer, hidden):
        self.context.bill("router", 1.0, torch.ones(1, 1, dtype=torch.bool, device=hidden.device))
        return super().gates(layer, hidden)


def test_what_cannot_be_recorded_fails_aloud(model):
    tokens = ids(1, 9)
    for method, fault in ((Peeking(), RuntimeError), (Choosy(), TypeError)):
        with Graphs(recorder()) as graphs, torch.inference_mode():
            with pytest.raises(fault), attach(model, method, mode=graphs):
                incremental(model, tokens, 6)
            with attach(model, ROUTED["reading"], mode=graphs):
                incremental(model, tokens, 6)
    if DEVICE.type == "cpu":
        stand_in = StandIn()
        with stand_in.session():
            stand_in.begin()
            with pytest.raises(Refused):
                torch.ones(3).nonzero()


def test_masks_given_for_the_bench_are_read_where_they_stay(model):
    masks = torch.rand(4, 2, 1, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    method = given(masks, "generation")
    eager, trace = both(model, method, ids(1, 14))
    same_ledgers(eager, trace)


def test_random_masks_are_asked_between_pieces(model):
    """A method that cannot be recorded is asked as in eager mode, its blocks are repeated."""
    own = StandIn() if DEVICE.type == "cpu" else None
    with torch.inference_mode(), Graphs(own) as graphs:
        with attach(model, RandomMask(), mode=graphs):
            incremental(model, ids(1, 12), 6)
        kinds = {key[0] for key in graphs._recorded}
    assert kinds == {"pieces"}


class Odd(DynamicLayer):
    """Keeps tokens in a way of its own."""

    def update(self, *states, **more):
        return super().update(*states, **more)


def test_caches_of_another_kind_are_left_alone(model):
    tokens, keyword = ids(1, 9), cache_argument(model)
    found = []
    for how in (Graphs(recorder()), "eager"):
        with torch.inference_mode(), attach(model, METHODS["masks"], mode=how):
            cache = DynamicCache()
            cache.layer_class_to_replicate = Odd
            for start, end in ((0, 6), (6, 7), (7, 8)):
                out = model(tokens[:, start:end], **{keyword: cache}, use_cache=True)
            found.append(out.logits)
        if how != "eager":
            assert (how.steps, how.others) == (0, 2)
    assert torch.equal(*found)


def test_recordings_are_bounded(model, monkeypatch):
    """A method may have a plan for each sequence: what was not asked for longest is let go."""
    monkeypatch.setattr(module, "_MOST", 2)
    plans = [GivenPlan(plan=plan_without(4, (layer, 0))) for layer in range(4)]
    tokens = ids(1, 9)
    with Graphs(recorder()) as graphs, torch.inference_mode():
        for method in (*plans, plans[0]):
            with attach(model, method, mode=graphs):
                found = incremental(model, tokens, 6)
            with attach(model, method):
                want = incremental(model, tokens, 6)
            torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
            assert len(graphs._recorded) <= 2
        assert graphs.others == 0


def test_arguments_that_a_recording_knows_nothing_of(model):
    keyword, tokens = cache_argument(model), ids(1, 9)
    with (
        Graphs(recorder()) as graphs,
        torch.no_grad(),
        attach(model, METHODS["scattered"], mode=graphs),
    ):
        cache = cache_of(model(tokens[:, :6], use_cache=True))
        step = {keyword: cache, "use_cache": True}
        model(tokens[:, 6:7], output_attentions=None, **step)
        assert (graphs.steps, graphs.others) == (1, 0)
        model(tokens[:, 7:8], some_of_theirs=torch.ones(3, device=DEVICE), **step)
        assert (graphs.steps, graphs.others) == (1, 1)


def test_a_verdict_that_never_comes_is_an_error(monkeypatch):
    from dyndepth.runtime import steps

    monkeypatch.setattr(steps, "_PATIENCE", 10)
    mail = steps.Mail(3, StandIn(), torch.device("cpu"))
    assert mail.all_read() is None
    with pytest.raises(RuntimeError, match="no verdict came on block 1"):
        mail.read(1)
    flags = torch.tensor([[[False], [True]], [[False], [False]]])
    mail.post(1, flags)
    assert mail.read(1) == (True, False)
    mail.post_all(torch.stack([flags, ~flags, flags]))
    assert mail.all_read() == [(True, False), (True, True), (True, False)]
    mail.reset()
    assert mail.all_read() is None
