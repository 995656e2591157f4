"""Attached models in other people's hands: their hooks, outputs by block, copies, threads, and
forwards that run some of the blocks, fail, or are computed again."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from conftest import variants
from gating import GivenPlan, RandomMask, plan_without
from test_attach import LAYERS, ids, padded
from test_flops import counted
from torch import nn

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import Block, Decoder, blocks, causal_lm, decoder
from dyndepth.models.caches import cache_argument
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach, attached

TOLERANCE = 1e-5
PLAN = GivenPlan(plan=plan_without(LAYERS, (0, 0), (0, 1), (2, 0), (3, 1)))
DOCUMENTS = GivenPlan(
    plan={
        "a": plan_without(LAYERS, (0, 0), (1, 0)),
        "b": plan_without(LAYERS, (0, 0), (2, 0)),
    }
)


class Soft(RandomMask):
    """Gates that look at the stream and carry a gradient to their weights."""

    def start(self, context):
        self.asked = []

    def gates(self, layer, hidden):
        self.asked.append(layer)
        gate = torch.sigmoid(3 * hidden.mean(-1) + self.weights[layer])
        return gate, 1 - gate


class Narrowing(RandomMask):
    """Asks of what it decided before: a token that has left stays out."""

    def start(self, context):
        self.alive = torch.ones(context.batch, context.tokens, dtype=torch.bool)

    def gates(self, layer, hidden):
        self.alive = self.alive & (hidden.mean(-1) > -0.2 * (LAYERS - layer))
        return self.alive, self.alive


def trained(tiny, family, reentrant, **config):
    """A model in training mode that drops nothing, with checkpointing unless None."""
    model = tiny(family, **config).train().requires_grad_(True)
    for module in (*model.modules(), model.config):
        for name, value in vars(module).items():
            if isinstance(value, float) and (
                "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
            ):
                setattr(module, name, 0.0)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


# --- what is computed again -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "backend"),
    [
        (RandomMask(), "sparse"),
        (PLAN, "sparse"),
        (Narrowing(), "sparse"),
        (Narrowing(), "masked"),
        (Soft(), "masked"),
        (GivenPlan(plan={"a": PLAN.plan, "b": plan_without(LAYERS, (1, 1))}), "sparse"),
    ],
    ids=["masks", "plan", "narrowing", "narrowing_masked", "soft", "by_document"],
)
def test_gradient_checkpointing_changes_nothing(tiny, family, reentrant, method, backend):
    """Loss, gradients and every count, with two forwards before one backward pass."""
    if family not in ("llama", "gpt2", "bloom") and (reentrant or backend == "masked"):
        pytest.skip(
            "the families differ in what a block gets, the backends in what they do with it"
        )
    found = []
    for mode in (None, reentrant):
        model = trained(tiny, family, mode)
        method.weights = torch.zeros(LAYERS, requires_grad=True)
        with attach(model, method, backend=backend, documents=["a", "b"]) as trace:
            loss = model(ids(2, 9), labels=ids(2, 9), use_cache=False).loss
            trace.documents = ["b", "a"]
            loss = loss + model(ids(2, 7, seed=1), labels=ids(2, 7), use_cache=False).loss
            before = trace.totals()
            loss.backward()
            assert trace.totals() == before
            counts = [trace.totals(), trace.by_document(), trace.executed(), trace.gates()]
        grads = [p.grad for p in (*model.parameters(), method.weights) if p.grad is not None]
        found.append((loss.detach(), counts, grads))
    torch.testing.assert_close(*(each[0] for each in found), atol=0, rtol=0)
    torch.testing.assert_close(*(each[1] for each in found), atol=0, rtol=0)
    torch.testing.assert_close(*(each[2] for each in found), atol=TOLERANCE, rtol=1e-4)
    if backend == "sparse":
        assert counts[0]["block_flops"] < counts[0]["dense_block_flops"]
    if isinstance(method, Soft):
        assert method.weights.grad.abs().min() > 0
        assert method.asked == list(range(LAYERS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_computed_again_is_counted_once(tiny, reentrant):
    from torch.utils.checkpoint import checkpoint

    model = tiny().requires_grad_(True)
    embeds = model.get_input_embeddings()(ids(2, 6))
    with attach(model, RandomMask()) as trace:
        model(inputs_embeds=embeds)
        want = trace.totals()
        trace.reset()
        call = lambda states: model(inputs_embeds=states, use_cache=False).logits  # noqa: E731
        checkpoint(call, embeds, use_reentrant=reentrant).mean().backward()
        assert trace.totals() == want


def test_a_block_computed_again_without_its_gates_is_refused(tiny):
    from torch.utils.checkpoint import checkpoint

    model = tiny().requires_grad_(True)
    with attach(model, PLAN):
        states = torch.randn(1, 4, 32, requires_grad=True)
        angles = model.model.rotary_emb(states, torch.arange(4)[None])
        call = lambda x: decoder(model).layers[1](x, position_embeddings=angles)  # noqa: E731
        with pytest.warns(UserWarning, match="outside of a forward of LlamaModel"):
            out = checkpoint(call, states, use_reentrant=False)
        with pytest.raises(UserError, match="block 1 .* gradient_checkpointing_enable"):
            out.mean().backward()


# --- some of the blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan", "masks"])
@pytest.mark.parametrize("how", ["configuration", "list"])
def test_drafts_of_some_blocks_count_what_ran(tiny, name, how):
    """A forward of the first blocks alone, between forwards of all."""
    model, method = tiny("llama", "eager"), {"plan": PLAN, "masks": RandomMask()}[name]
    owner = decoder(model)
    whole = owner.layers
    with attach(model, method) as trace:
        model(ids(2, 9))
        before = trace.totals()
        if how == "list":
            owner.layers = whole[:2]
        else:
            model.config.num_hidden_layers = 2
        assert counted(lambda: model(ids(2, 9))) == sum(trace.flops.values()) - sum(
            before["by_cause"].values()
        )
        after, executed, gates = trace.totals(), trace.executed(), trace.gates()
        owner.layers, model.config.num_hidden_layers = whole, LAYERS
        model(ids(2, 9))
        assert trace.totals()["block_flops"] == after["block_flops"] + before["block_flops"]
    assert after["tokens"] == 2 * before["tokens"]
    assert after["dense_block_flops"] == 2 * before["dense_block_flops"]
    assert gates.shape == (2, 9, LAYERS, 2)
    assert not gates[:, :, 2:].any()
    if name == "plan":
        assert executed[:, 1].tolist() == [0.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("method", [PLAN, RandomMask(), RandomMask(phases="generation")])
def test_assisted_decoding(tiny, method):
    """Early-exit drafts and prompt look-up give the tokens of plain decoding, and are counted."""
    model, given = tiny(), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with attach(model, method) as trace:
        plain = model.generate(ids(1, 6), **given)
        alone = trace.totals()
        for more in ({"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 2}):
            trace.reset()
            drafted = model.generate(ids(1, 6), **given, **more)
            found = trace.totals()
            if method is not PLAN:  # thinned caches cannot be shared with a draft of other blocks
                assert torch.equal(drafted, plain)
            assert found["tokens"] >= alone["tokens"]
            assert 0 < found["block_flops"] < found["dense_block_flops"]
            assert trace.gates().shape[2:] == (LAYERS, 2)


def test_blocks_called_by_hand_run_in_full_and_are_not_counted(tiny):
    model = tiny()
    with attach(model, PLAN) as trace:
        model(ids(2, 5))
        before = trace.totals()
        states = torch.randn(3, 4, 32)
        angles = model.model.rotary_emb(states, torch.arange(4)[None])
        with pytest.warns(UserWarning, match="block 3 was called outside of a forward"):
            decoder(model).layers[3](states, position_embeddings=angles)
        with warnings.catch_warnings(action="error"):  # once is enough
            found = decoder(model).layers[0](states, position_embeddings=angles)
        assert trace.totals() == before
        assert trace.gates().shape[:2] == (2, 5)
    torch.testing.assert_close(found, decoder(model).layers[0](states, position_embeddings=angles))


def test_a_block_in_several_places(tiny):
    """One module as the second and the third block: each call has the gates of its place."""
    model, plain = tiny("llama", "eager"), tiny("llama", "eager")
    decoder(model).layers[2] = decoder(model).layers[1]
    decoder(plain).layers[2].load_state_dict(decoder(plain).layers[1].state_dict())
    for method in (GivenPlan(plan=plan_without(LAYERS, (1, 0), (2, 1))), RandomMask()):
        with attach(plain, method) as trace:
            want = plain(ids(2, 6), use_cache=False).logits
            counts = [trace.totals(), trace.executed(), trace.gates()]
        with attach(model, method) as trace:
            flops = counted(lambda: model(ids(2, 6), use_cache=False))
            assert flops == sum(trace.flops.values())
            torch.testing.assert_close([trace.totals(), trace.executed(), trace.gates()], counts)
            torch.testing.assert_close(model(ids(2, 6), use_cache=False).logits, want)
    assert type(decoder(model).layers[1]) is type(decoder(plain).layers[1])


def test_parts_are_of_the_moment(tiny):
    """A model's parts are looked up anew, and split once, whenever a method is attached."""
    model, other, split = tiny(), tiny(seed=1), []
    parts = Decoder.of(model)
    decoder(model).layers[2] = decoder(other).layers[2]
    model.lm_head = other.lm_head
    now = Decoder.of(model)
    assert [a is b for a, b in zip(parts.layers, now.layers, strict=True)].count(False) == 1
    assert now.blocks[2].layer is decoder(other).layers[2] is not parts.blocks[2].layer
    assert now.head is other.lm_head is not parts.head
    want = model(ids(2, 5)).logits
    make = Block.__init__

    def count(block, *given):
        split.append(block)
        make(block, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "__init__", count)
        with attach(model, RandomMask(rate=1.0)) as trace:
            assert len(split) == LAYERS
            torch.testing.assert_close(model(ids(2, 5)).logits, want)
            assert trace.totals()["block_flops"] == trace.totals()["dense_block_flops"]
        with attach(model, PLAN):
            pass
    assert len(split) == 2 * LAYERS


def test_blocks_that_came_after_attach_are_refused(tiny):
    model, other = tiny(), tiny()
    with attach(model, PLAN) as trace:
        model(ids(1, 4))
        decoder(model).layers[3] = decoder(other).layers[3]
        with pytest.raises(UserError, match="block 3 was not in the model"):
            model(ids(1, 4))
    assert trace.totals()["tokens"] == 4
    model.config.num_hidden_layers = 2
    with attach(model, GivenPlan(plan=PLAN.plan[:2])):
        model.config.num_hidden_layers = LAYERS
        with pytest.raises(UserError, match="block 2 was not in the model"):
            model(ids(1, 4))


# --- shared blocks ----------------------------------------------------------------------------


def sharing(tiny):
    """Two models; the second and the third block of the one are blocks of the other."""
    first, second = tiny(), tiny(seed=1)
    for index in (1, 2):
        decoder(second).layers[index] = decoder(first).layers[index]
    return first, second


def test_a_model_that_shares_blocks_with_an_attached_one_is_stock(tiny):
    first, second = sharing(tiny)
    want = second(ids(2, 5)).logits
    with attach(first, PLAN) as trace:
        first(ids(1, 7))
        before = trace.totals()
        with pytest.warns(UserWarning, match="outside"):
            assert torch.equal(second(ids(2, 5)).logits, want)
        assert trace.totals() == before
        first(ids(1, 7))
        assert trace.totals()["block_flops"] == 2 * before["block_flops"]


@pytest.mark.filterwarnings("ignore:block .* outside")
@pytest.mark.parametrize("first_leaves", [True, False])
def test_two_attached_models_that_share_blocks(tiny, first_leaves):
    """Each has its own gates and its own counts, and they leave in any order."""
    models = sharing(tiny)
    methods = (PLAN, RandomMask())
    classes = [[type(layer) for layer in decoder(model).layers] for model in models]
    want, counts, stock = [], [], [model(ids(2, 5)).logits for model in models]
    for model, method in zip(models, methods, strict=True):
        with attach(model, method) as trace:
            want.append(model(ids(2, 5)).logits)
            counts.append(trace.totals())
    held = [attach(model, method) for model, method in zip(models, methods, strict=True)]
    traces = [each.__enter__() for each in held]
    for index in (0, 1, 0):
        assert torch.equal(models[index](ids(2, 5)).logits, want[index])
    assert traces[0].totals()["block_flops"] == 2 * counts[0]["block_flops"]
    assert traces[1].totals() == counts[1]
    leaving, staying = (0, 1) if first_leaves else (1, 0)
    held[leaving].__exit__(None, None, None)
    assert torch.equal(models[leaving](ids(2, 5)).logits, stock[leaving])
    assert torch.equal(models[staying](ids(2, 5)).logits, want[staying])
    held[staying].__exit__(None, None, None)
    assert [[type(layer) for layer in decoder(model).layers] for model in models] == classes
    for model, logits in zip(models, stock, strict=True):
        assert torch.equal(model(ids(2, 5)).logits, logits)


# --- forwards that fail, nest or meet -----------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("method", [PLAN, RandomMask(), DOCUMENTS])
def test_failed_forwards_are_left_out(tiny, error, method):
    model = tiny("llama", "eager")

    def fail(*_):
        raise error("in the middle")

    def reads(trace):
        return [trace.totals(), trace.by_document(), trace.executed(), trace.flops]

    with attach(model, method, documents=["a", "b"]) as trace:
        handle = decoder(model).layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model(ids(2, 9), output_attentions=True)
        assert trace.totals()["tokens"] == 0
        kept = [len(block.attention._forward_hooks) for block in blocks(model)]
        assert max(kept) <= 1  # transformers' own, which it leaves there
        states, block = torch.randn(1, 4, 32), decoder(model).layers[0]
        angles = model.model.rotary_emb(states, torch.arange(4)[None])
        with pytest.warns(UserWarning, match="block 0 was called outside of a forward"):
            found = block(states, position_embeddings=angles)
        stock = type(block).__base__.forward
        assert torch.equal(found, stock(block, states, position_embeddings=angles))
        with pytest.raises(RuntimeError, match="needs a forward"):
            trace.gates()
        handle.remove()
        thread = threading.Thread(target=model, args=(ids(2, 5),))
        thread.start()
        thread.join()
        want, gates = reads(trace), trace.gates()
        trace.reset()
        model(ids(2, 5))
        torch.testing.assert_close(reads(trace), want, atol=0, rtol=0)
        handle = decoder(model).layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model(ids(2, 9))
        torch.testing.assert_close(reads(trace), want, atol=0, rtol=0)
        assert torch.equal(trace.gates(), gates)
        handle.remove()
        assert counted(lambda: model(ids(2, 5))) == sum(want[0]["by_cause"].values())


def test_a_method_that_fails_to_start(tiny):
    class Failing(RandomMask):
        def start(self, context):
            if context.tokens == 3:
                raise ValueError("no")
            super().start(context)

    model = tiny()
    with attach(model, Failing()) as trace:
        model(ids(1, 5))
        with pytest.raises(ValueError, match="no"):
            model(ids(1, 3))
        model(ids(1, 4))
        assert trace.totals()["tokens"] == 9


def test_reading_counts_closes_nothing(tiny):
    """Whatever is read in between, heads and readouts are billed to the last forward."""
    model, totals = tiny(), []
    for read in (False, True):
        with attach(model, RandomMask(), documents=["a", "b"]) as trace:
            hidden = decoder(model)(ids(2, 5)).last_hidden_state
            for _ in range(2 * read):
                assert trace.totals()["tokens"] == trace.by_document()["a"]["tokens"] * 2 == 10
                assert trace.executed().shape == (LAYERS, 2)
            model.lm_head(input=hidden)
            trace.readout(hidden[:, -1], torch.tensor([0, 1]))
            trace.bill_last([[("x", 5)], [("x", 5), ("y", 5)]])
            totals.append([trace.totals(), trace.by_document(), trace.executed()])
            assert trace.gates().shape == (2, 5, LAYERS, 2)
    torch.testing.assert_close(*totals, atol=0, rtol=0)


def test_a_forward_inside_a_forward(tiny):
    """A hook that asks the same model something else: both are counted, each with its gates."""
    model = tiny()
    with attach(model, PLAN) as trace:
        model(ids(2, 7))
        want, alone = model(ids(2, 7)).logits, trace.totals()["block_flops"] / 2
        trace.reset()
        model(ids(1, 3))
        other = trace.totals()["block_flops"]
        trace.reset()
        inside = []

        def ask(*_):
            if not inside:
                inside.append(1)
                model(ids(1, 3))

        handle = decoder(model).layers[1].register_forward_hook(ask)
        assert torch.equal(model(ids(2, 7)).logits, want)
        handle.remove()
        assert trace.totals()["block_flops"] == alone + other
        assert trace.gates().shape[:2] == (2, 7)


def test_a_second_thread_is_refused(tiny):
    model, errors = tiny(), []

    def other():
        try:
            model(ids(1, 3))
        except UserError as error:
            errors.append(str(error))

    def meanwhile(*_):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with attach(model, PLAN) as trace:
        handle = decoder(model).layers[1].register_forward_hook(meanwhile)
        model(ids(1, 5))
        handle.remove()
        other()  # one after the other is well
    assert len(errors) == 1
    assert "one forward at a time" in errors[0]
    assert trace.totals()["tokens"] == 8


# --- outputs by block ---------------------------------------------------------------------------


@variants()
def test_attentions_and_hidden_states_keep_their_places(tiny, family, attn):
    model, entered = tiny(family, attn), {}
    tokens, mask, _ = padded("left")
    given = {"attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
    for index, block in enumerate(blocks(model)):
        block.layer.register_forward_pre_hook(lambda m, a, i=index: entered.update({i: a[0]}))
    for method, skipped in ((PLAN, {0, 2}), (RandomMask(), set()), (DOCUMENTS, {0})):
        for backend in ("sparse", "masked"):
            with attach(model, method, backend=backend, documents=["a", "b", "b"]):
                plain = model(tokens, attention_mask=mask).logits
                out = model(tokens, **given)
            torch.testing.assert_close(out.logits, plain, atol=TOLERANCE, rtol=0)
            assert len(out.hidden_states) == LAYERS + 1
            assert all(torch.equal(out.hidden_states[index], entered[index]) for index in entered)
            assert len(out.attentions) == LAYERS
            for index, weights in enumerate(out.attentions):
                skips = backend == "sparse" and index in skipped
                assert (weights is None) == (skips or attn != "eager")
                assert weights is None or weights.shape == (3, 4, 12, 12)
    if attn == "eager":
        with attach(model, GivenPlan(plan=plan_without(LAYERS, (3, 0)))):
            found = model(tokens, **given).attentions
        stock = model(tokens, **given).attentions
        assert all(torch.equal(*pair) for pair in zip(found[:3], stock[:3], strict=True))


def test_attentions_in_generate_with_and_without_a_cache(tiny):
    model = tiny("llama", "eager")
    given = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_attentions": True}
    for method, ran in ((PLAN, [False, True, False, True]), (RandomMask(rate=0.9), [True] * 4)):
        for use_cache in (True, False):
            with attach(model, method):
                out = model.generate(ids(2, 5), use_cache=use_cache, **given)
            assert len(out.attentions) == 3
            for step, entries in enumerate(out.attentions):
                if method is PLAN:
                    assert [entry is not None for entry in entries] == ran
                shapes = {tuple(entry.shape[2:]) for entry in entries if entry is not None}
                width = 1 if use_cache and step else 5 + step
                assert shapes <= {(width, 5 + step)}
    assert not any(block.attention._forward_hooks for block in blocks(tiny("llama", "eager")))


@pytest.mark.parametrize("setting", ["argument", "configuration"])
def test_attentions_in_plain_tuples(tiny, setting):
    model = tiny("llama", "eager")
    given = {"output_attentions": True} if setting == "argument" else {}
    model.config.output_attentions = setting == "configuration"
    stock = decoder(model)(ids(1, 5), use_cache=False, return_dict=False, **given)
    with attach(model, PLAN):
        found = decoder(model)(ids(1, 5), use_cache=False, return_dict=False, **given)
    assert type(found) is type(stock) is tuple
    assert len(found) == len(stock)
    assert [entry is None for entry in found[-1]] == [True, False, True, False]


def test_attention_hooks_of_a_failed_forward_are_gone(tiny):
    model = tiny("llama", "eager")
    with attach(model, PLAN):
        handle = decoder(model).layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids(1, 4), output_attentions=True)
        handle.remove()
        kept = [len(block.attention._forward_hooks) for block in blocks(model)]
    model(ids(1, 4), output_attentions=True)
    assert max(kept) <= 1  # transformers' own, which it leaves there


# --- hooks and wrappers of others ---------------------------------------------------------------


def shifted(module, args, output):
    """A forward hook that steers: the last position of each sequence is moved."""
    first = output[0] if isinstance(output, tuple) else output
    assert first.ndim == 3
    moved = first.clone()
    moved[:, -1] += 0.5
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "bloom"])
@pytest.mark.parametrize("part", ["attention", "mlp", "mlp_norm", "attention_post", "mlp_post"])
def test_hooks_on_a_sublayers_own_modules_see_all_tokens(tiny, family, part):
    """Whatever the gates, they run as on the stock model, wherever the sublayer runs at all."""
    model, calls = tiny(family), []
    for block in blocks(model):
        modules = {
            "attention": [block.attention],
            "mlp": block.mlp_modules[1:2],
            "mlp_norm": block.mlp_modules[:1],
            "attention_post": block.attention_modules[2:],
            "mlp_post": block.mlp_modules[len(block._mlp) + 1 :],
        }[part]
        if not modules or any(isinstance(module, nn.Identity) for module in modules):
            pytest.skip(f"{family} has none")
        for module in modules:
            module.register_forward_hook(shifted)
            module.register_forward_hook(lambda m, a, o: calls.append(m))
    logits = []
    for backend in ("sparse", "masked"):
        calls.clear()
        with attach(model, RandomMask(), backend=backend) as trace:
            logits.append(model(ids(3, 9)).logits)
        assert len(calls) >= LAYERS
        assert trace.totals()["block_flops"] > 0
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    with attach(model, RandomMask(rate=1.0)):
        assert torch.equal(model(ids(3, 9)).logits, model(ids(3, 9)).logits)


def test_the_ledger_counts_sublayers_that_run_whole_for_hooks(tiny):
    model = tiny("llama", "eager")
    useful = []
    for hooked in (False, True):
        if hooked:
            for block in blocks(model):
                block.attention.register_forward_pre_hook(lambda *_: None)
                block.mlp_modules[1].register_full_backward_hook(lambda *_: None)
        with attach(model, RandomMask()) as trace:
            assert counted(lambda: model(ids(3, 9))) == sum(trace.flops.values())
            useful.append(trace.totals()["total_flops"])
            padding = trace.flops["padding"]
    assert useful[0] == useful[1]
    assert padding > 0


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_forward_pre_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_on_all_modules_see_all_tokens(tiny, register):
    model, calls = tiny("llama", "eager"), []
    handle = getattr(nn.modules.module, register)(lambda m, *_: calls.append(m))
    try:
        with attach(model, RandomMask()) as trace:
            states = model.get_input_embeddings()(ids(3, 9)).requires_grad_(True)
            assert counted(lambda: model(inputs_embeds=states)) == sum(trace.flops.values())
            assert trace.flops["padding"] > 0
            model(inputs_embeds=states, return_dict=False)[0].mean().backward()
    finally:
        handle.remove()
    want = [m for b in blocks(model) for m in (b.attention, b.mlp_modules[1])]
    assert {id(m) for m in want} <= {id(m) for m in calls}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "phi3"])
def test_hooks_on_projections_run(tiny, family):
    """On the maps of queries, keys and values, fused ones included: on the tokens that they see."""
    model = tiny(family)
    record, calls = FAMILIES[family], []
    for block in blocks(model):
        for name in {record.query, record.key, record.value, record.output}:
            getattr(block.attention, name).register_forward_hook(
                lambda m, a, out, i=block.index: (calls.append(i), out * 1.25)[1]
            )
    for method in (RandomMask(), PLAN):
        logits = []
        for backend in ("sparse", "masked"):
            calls.clear()
            with attach(model, method, backend=backend):
                logits.append(model(ids(3, 9)).logits)
            skipped = {0, 2} if (method, backend) == (PLAN, "sparse") else set()
            assert set(calls) == set(range(LAYERS)) - skipped
        torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["parametrized", "weight_norm", "pruned", "subclass", "forward"])
def test_projections_with_weights_of_another_kind(tiny, family, kind):
    """What computes a weight, or computes in a map's place, is asked wherever the map is."""
    from torch.nn.utils import parametrize, prune, weight_norm

    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    class Quantised(torch.Tensor):
        """A weight that can be multiplied by and nothing else."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("__getitem__", "unflatten", "t"):
                raise NotImplementedError(function)
            out = super().__torch_function__(function, types, args, kwargs)
            multiplied = function is torch.nn.functional.linear
            return out.as_subclass(torch.Tensor) if multiplied else out

    model, plain = tiny(family), tiny(family)
    for block, other in zip(blocks(model), blocks(plain), strict=True):
        module = getattr(block.attention, FAMILIES[family].key)
        reference = getattr(other.attention, FAMILIES[family].key)
        if kind == "parametrized":
            parametrize.register_parametrization(module, "weight", Half())
            reference.weight.data *= 0.5
        elif kind == "weight_norm":
            weight_norm(module)
            module.weight_g.data *= 0.5  # seen by its hook alone
            reference.weight.data *= 0.5
        elif kind == "pruned":
            prune.custom_from_mask(module, "weight", torch.ones_like(module.weight))
            module.weight_orig.data *= 0.5
            reference.weight.data *= 0.5
        elif kind == "subclass" and family != "gpt2":
            module.weight = nn.Parameter(
                (module.weight.data * 0.5).as_subclass(Quantised), requires_grad=False
            )
            reference.weight.data *= 0.5
        else:
            stock = module.forward
            module.forward = lambda states, stock=stock: stock(states * 0.5)
            module.bias = None if module.bias is None else nn.Parameter(module.bias * 0)
            reference.weight.data *= 0.5
            if reference.bias is not None:
                reference.bias.data *= 0
    found = []
    for each in (model, plain):
        with attach(each, RandomMask()):
            found.append(each(ids(3, 9)).logits)
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)


def test_a_fused_map_that_is_hooked_while_attached_is_refused(tiny):
    model = tiny("gpt2")
    with attach(model, RandomMask()):
        model(ids(1, 5))
        blocks(model)[1].attention.c_attn.register_forward_hook(lambda *_: None)
        with pytest.raises(UserError, match=r"queries, keys and\s+values while .* before attach"):
            model(ids(1, 5))


def test_a_forward_that_somebody_put_on_an_attention(tiny):
    model = tiny()
    for block in blocks(model):
        stock = block.attention.forward

        def doubled(*args, stock=stock, **kwargs):
            out, weights = stock(*args, **kwargs)
            return out * 2, weights

        block.attention.forward = doubled
    logits = []
    for backend in ("sparse", "masked"):
        with attach(model, RandomMask(), backend=backend):
            logits.append(model(ids(3, 9)).logits)
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


def test_backward_hooks_run(tiny):
    model, seen = tiny().requires_grad_(True), []
    for block in blocks(model):
        for module in (block.layer, block.attention, block.mlp_modules[1]):
            module.register_full_backward_hook(lambda m, i, o: seen.append(m))
    for method in (RandomMask(), GivenPlan(plan=plan_without(LAYERS, (1, 0)))):
        seen.clear()
        with attach(model, method):
            model(ids(2, 20)).logits.mean().backward()
        missing = [blocks(model)[1].attention] if isinstance(method, GivenPlan) else []
        want = [m for b in blocks(model) for m in (b.layer, b.attention, b.mlp_modules[1])]
        assert {id(m) for m in want} - {id(m) for m in seen} == {id(m) for m in missing}


def test_dropout_in_training_mode(tiny):
    """In the attention it falls as in the stock model: not under selected tokens alone."""
    model = tiny("gpt2", "eager", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train()
    logits = []
    for backend in ("sparse", "masked"):
        torch.manual_seed(0)
        with attach(model, RandomMask(sublayers=(0,)), backend=backend):
            logits.append(model(ids(3, 9)).logits)
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    torch.manual_seed(1)
    with attach(model, RandomMask(sublayers=(0,))):
        assert not torch.allclose(model(ids(3, 9)).logits, logits[0], atol=1e-2)


@pytest.mark.parametrize("which", ["model", "decoder", "block"])
def test_what_is_compiled_in_place_is_refused(tiny, which):
    model = tiny()
    part = {"model": model, "decoder": decoder(model), "block": decoder(model).layers[2]}[which]
    part.compile(backend="eager")
    with pytest.raises(UserError, match="compiled"), attach(model, PLAN):
        pass
    model = tiny()
    for block in blocks(model):  # a part of a block may be
        block.mlp_modules[1].compile(backend="eager")
    with attach(model, PLAN):
        model(ids(1, 5))


# --- copies, files, devices ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_an_attached_model_are_stock(tiny, family):
    model = tiny(family)
    want, kind = model(ids(2, 5)).logits, type(blocks(model)[0].layer)
    with attach(model, PLAN) as trace:
        one = copy.deepcopy(model)
        assert not attached(one)
        assert {type(block.layer) for block in blocks(one)} == {kind}
        assert torch.equal(one(ids(2, 5)).logits, want)
        assert trace.totals()["tokens"] == 0
        with attach(one, RandomMask()) as other:
            one(ids(2, 5))
            model(ids(2, 5))
        assert trace.totals()["tokens"] == other.totals()["tokens"] == 10
        layer = pickle.loads(pickle.dumps(blocks(model)[0].layer))
        assert type(layer) is kind
    assert not attached(one)
    assert torch.equal(one(ids(2, 5)).logits, want)


def test_files_of_an_attached_model(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny()
    want, names = model(ids(2, 5)).logits, list(model.state_dict())
    with attach(model, PLAN):
        assert list(model.state_dict()) == names
        for part in (model, decoder(model)):
            with pytest.raises(UserError, match="save after the `with` block.*dyndepth.export"):
                part.save_pretrained(tmp_path)
            with pytest.raises(UserError, match="a method is attached"):
                part.push_to_hub("somewhere")
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="pickled while a method is attached"):
            torch.save(model, tmp_path / "whole.pt")
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(again(ids(2, 5)).logits, want)


@pytest.fixture
def any_peft(monkeypatch):
    """Transformers asks for a newer peft than it needs here."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


@pytest.mark.parametrize("late", [False, True])
def test_adapters_of_an_attached_model_are_saved(tiny, tmp_path, late, any_peft):
    """By peft's wrapper and by transformers' own way, both of which save adapters alone."""
    from peft import LoraConfig, get_peft_model

    how = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = get_peft_model(tiny(), how)
    with attach(wrapped, PLAN):
        wrapped.save_pretrained(tmp_path / "peft")
        for part in (wrapped.get_base_model(), decoder(wrapped)):
            with pytest.raises(UserError, match="a method is attached"):
                part.save_pretrained(tmp_path / "whole")
    inside = tiny()
    if not late:
        inside.add_adapter(how)
    with attach(inside, PLAN):
        if late:
            inside.add_adapter(how)
        inside.save_pretrained(tmp_path / "transformers")
    for each in ("peft", "transformers"):
        names = {file.name for file in (tmp_path / each).iterdir()}
        assert names - {"README.md", "generation_config.json"} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert not (tmp_path / "whole").exists()
    assert type(wrapped).__name__ == "PeftModel"


@pytest.mark.parametrize("wrap", [False, True])
def test_a_trainer_keeps_adapters_while_a_method_is_attached(tiny, tmp_path, wrap, any_peft):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model, how = tiny(), LoraConfig(r=2, target_modules=["q_proj"])
    if wrap:
        model = get_peft_model(model, how)
    else:
        model.add_adapter(how)
    rows = [{"input_ids": row, "labels": row} for row in ids(4, 6)]
    given = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, save_only_model=True
    )
    with attach(model, PLAN, backend="masked"):
        Trainer(model, given, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_attributes_that_a_stock_model_lacks_are_lacking(tiny):
    """Where no gradient checkpointing was ever asked for, while one or two run the blocks."""
    first, second = tiny(), tiny(seed=1)
    decoder(second).layers[1] = decoder(first).layers[1]
    name = "_gradient_checkpointing_func"
    with attach(first, PLAN):
        assert not any(hasattr(layer, name) for layer in decoder(first).layers)
        with attach(second, PLAN):
            assert not any(hasattr(layer, name) for layer in decoder(second).layers)
        first.gradient_checkpointing_enable()
        assert all(hasattr(layer, name) for layer in decoder(first).layers)


def test_a_model_may_change_its_precision_while_attached(tiny):
    model = tiny()
    for method in (PLAN, RandomMask()):
        with attach(model.float(), method) as trace:
            single = model(ids(2, 5)).logits
            model.double()
            double = model(ids(2, 5)).logits
            assert trace.totals()["tokens"] == 20
        torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_the_lm_head_are_counted(tiny):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama", "eager"), LoraConfig(r=4, target_modules=["lm_head"]))
    with attach(model, RandomMask()) as trace:
        assert counted(lambda: model(ids(2, 5))) == sum(trace.flops.values())
    assert causal_lm(model).get_output_embeddings() is not None
    assert cache_argument(model)
