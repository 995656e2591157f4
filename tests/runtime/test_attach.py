"""The runtime executes any gates exactly, whatever the shapes, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import GivenPlan, RandomMask, plan_without
from transformers import DynamicCache

from dyndepth.common.errors import UserError
from dyndepth.method import SUBLAYERS, DynamicDepthMethod
from dyndepth.models.blocks import decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach

LAYERS = 4
METHODS = {
    "masks": RandomMask(),
    "masks_generation": RandomMask(phases="generation"),
    "attention_masks": RandomMask(sublayers=(0,)),
    "mlp_masks": RandomMask(sublayers=(1,)),
    "no_first_block": GivenPlan(plan=plan_without(LAYERS, (0, 0), (0, 1))),
    "no_first_attention": GivenPlan(plan=plan_without(LAYERS, (0, 0))),
    "no_first_attention_generation": GivenPlan(
        plan=plan_without(LAYERS, (0, 0), (2, 1)), phases="generation"
    ),
    "no_last_block": GivenPlan(plan=plan_without(LAYERS, (3, 0), (3, 1))),
    "scattered": GivenPlan(plan=plan_without(LAYERS, (0, 0), (1, 1), (2, 0), (2, 1))),
    "nothing_left": GivenPlan(plan=((False, False),) * LAYERS),
    "by_document": GivenPlan(
        plan={
            "a": plan_without(LAYERS, (0, 0), (0, 1)),
            "b": plan_without(LAYERS, (0, 0), (3, 0)),
            "c": plan_without(LAYERS),
        }
    ),
    "by_document_generation": GivenPlan(
        plan={"a": plan_without(LAYERS, (0, 0)), "b": plan_without(LAYERS, (1, 1)), "c": ()},
        phases="generation",
    ),
}
METHODS["by_document_generation"].plan["c"] = plan_without(LAYERS, (0, 0), (2, 0))

everything = pytest.mark.parametrize("name", METHODS)
families = pytest.mark.parametrize("family", FAMILIES)
every_variant = variants()
implementations = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch, length), generator=generator).to(DEVICE)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three sequences of 12, 8 and 5 tokens: ids, attention mask, position ids."""
    mask = torch.ones(3, 12, dtype=torch.long, device=DEVICE)
    for row, missing in ((1, 4), (2, 7)):
        mask[row, :missing] = 0
    mask = mask if side == "left" else mask.flip(1)
    return ids(3, 12), mask, (mask.cumsum(1) - 1).clamp_min(0)


def incremental(model, tokens, prompt, chunk=1, **kwargs):
    """Logits of ``tokens`` by a prompt pass and steps of ``chunk`` tokens over its cache."""
    out = model(tokens[:, :prompt], use_cache=True, **kwargs)
    parts = [out.logits]
    for start in range(prompt, tokens.shape[1], chunk):
        step = tokens[:, start : start + chunk]
        out = model(step, **{cache_argument(model): cache_of(out)}, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def attached_and_failing(model) -> None:
    """An exception from the depth of a forward."""
    with attach(model, RandomMask(), documents=["a", "b"]):
        model(ids(3, 9))


@every_variant
def test_dense_equals_stock_and_detaching_restores(tiny, family, attn):
    model = tiny(family, attn)
    tokens = ids(2, 9)
    before = model(tokens).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with attach(model, RandomMask(rate=1.0)):
        found = model(tokens).logits
    # Where queries are laid among zeros, one fused map of the stock block is two.
    assert torch.equal(found, before) or DEVICE.type != "cpu"
    torch.testing.assert_close(found, before, atol=TOLERANCE, rtol=0)
    with pytest.raises(UserError, match="2 document"):
        attached_and_failing(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(tokens).logits, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@everything
@every_variant
def test_sparse_equals_masked(tiny, family, attn, name):
    model, method = tiny(family, attn), METHODS[name]
    tokens = ids(3, 11)
    with attach(model, method, documents=["a", "b", "c"], prompt_length=4):
        sparse = model(tokens).logits
    with attach(model, method, documents=["a", "b", "c"], prompt_length=4, backend="masked"):
        masked = model(tokens).logits
    assert not torch.allclose(sparse, model(tokens).logits, atol=1e-2)
    torch.testing.assert_close(sparse, masked, atol=TOLERANCE, rtol=0)


@everything
@every_variant
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_incremental_equals_one_forward(tiny, family, attn, name, backend):
    model, method = tiny(family, attn), METHODS[name]
    tokens = ids(3, 14)
    with attach(model, method, documents=["a", "b", "c"], backend=backend) as trace:
        by_token = incremental(model, tokens, prompt=6)
        by_chunk = incremental(model, tokens, prompt=6, chunk=3)
        trace.prompt_length = 6
        whole = model(tokens).logits
    torch.testing.assert_close(by_token, whole, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(by_chunk, whole, atol=TOLERANCE, rtol=0)


@everything
@implementations
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(tiny, attn, name, side):
    model, method = tiny("llama", attn), METHODS[name]
    tokens, mask, positions = padded(side)
    with attach(model, method, documents=["a", "b", "c"]) as trace:
        trace.prompt_length = torch.tensor([5, 4, 3])
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        together = trace.by_document()
        trace.reset()
        for row, document in enumerate("abc"):
            trace.documents, trace.prompt_length = [document], 5 - row
            real = mask[row].bool()
            single = model(tokens[row : row + 1, real]).logits
            torch.testing.assert_close(batch[row, real], single[0], atol=TOLERANCE, rtol=0)
        assert trace.by_document() == together  # FLOPs do not depend on batch mates either


@everything
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generate_with_left_padding_equals_single(tiny, attn, name):
    model, method = tiny("qwen3", attn), METHODS[name]
    tokens, mask, _ = padded("left")
    arguments = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with attach(model, method, documents=["a", "b", "c"]) as trace:
        first = model.generate(tokens, attention_mask=mask, **arguments)
        again = model.generate(tokens, attention_mask=mask, **arguments)
        assert torch.equal(first, again)
        for row, document in enumerate("abc"):
            trace.documents = [document]
            alone = model.generate(tokens[row : row + 1, mask[row].bool()], **arguments)
            assert torch.equal(alone[0, -6:], first[row, -6:])


@everything
def test_generate_equals_recomputation(tiny, name):
    """Greedy decoding over the cache picks what one full forward over its output picks."""
    model, method = tiny("llama", "sdpa"), METHODS[name]
    prompt = ids(3, 7)
    with attach(model, method, documents=["a", "b", "c"]) as trace:
        out = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        trace.prompt_length = 7
        logits = model(out).logits
    logits[..., model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits[:, 6:-1].argmax(-1), out[:, 7:])


@pytest.mark.parametrize("name", ["masks", "scattered", "no_first_attention_generation"])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # without and with a sliding window
def test_beams_and_sampling(tiny, family, name):
    model, method = tiny(family, "sdpa"), METHODS[name]
    prompt = ids(2, 7)
    with attach(model, method, documents=["a", "b"]) as trace:
        beams = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, num_beams=3)
        trace.prompt_length = 7
        scores = model(beams).logits.log_softmax(-1)
        trace.prompt_length = None
        again = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, num_beams=3)
        assert torch.equal(beams, again)
        torch.manual_seed(3)
        sampled = model.generate(
            prompt, max_new_tokens=5, min_new_tokens=5, do_sample=True, num_return_sequences=2
        )
        torch.manual_seed(3)
        assert torch.equal(
            sampled,
            model.generate(
                prompt, max_new_tokens=5, min_new_tokens=5, do_sample=True, num_return_sequences=2
            ),
        )
    greedy = scores[:, 6:-1].gather(2, beams[:, 7:, None]).sum(1)
    assert torch.isfinite(greedy).all()
    assert sampled.shape == (4, 12)


def test_dropped_attention_keeps_no_cache(tiny):
    model = tiny("llama", "sdpa")
    method = GivenPlan(plan=plan_without(LAYERS, (0, 0), (2, 0)))
    with attach(model, method):
        cache = cache_of(model(ids(1, 5), use_cache=True))
    assert [layer.keys is None for layer in cache.layers] == [True, False, True, False]
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * LAYERS


def test_prompt_only_cache_is_not_extended(tiny):
    model = tiny("llama", "sdpa")
    method = GivenPlan(plan=plan_without(LAYERS, (0, 0), (2, 0)), phases="generation")
    with attach(model, method):
        cache = cache_of(model(ids(1, 5), use_cache=True))
        model(ids(1, 3), **{cache_argument(model): cache}, use_cache=True)
    assert [layer.keys.shape[2] for layer in cache.layers] == [5, 8, 5, 8]
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_cache_is_cropped(tiny, family, phases):
    windows = {"sliding_window": 64} if family == "mistral" else {}
    model = tiny(family, "sdpa", **windows)
    if (family, phases) == ("mistral", "generation"):
        pytest.skip("a sliding layer that was thinned cannot tell which tokens it holds")
    method = GivenPlan(plan=plan_without(LAYERS, (0, 0)), phases=phases)
    tokens = ids(1, 9)
    with attach(model, method) as trace:
        cache = DynamicCache() if family == "llama" else DynamicCache(config=model.config)
        model(tokens[:, :5], **{cache_argument(model): cache})
        model(ids(1, 3, seed=1), **{cache_argument(model): cache})
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        logits = model(tokens[:, 5:], **{cache_argument(model): cache}).logits
        trace.prompt_length = 5
        whole = model(tokens).logits
    torch.testing.assert_close(logits, whole[:, 5:], atol=TOLERANCE, rtol=0)


def test_hidden_states_and_gradients_pass(tiny):
    model = tiny("llama", "sdpa")
    tokens = ids(2, 6)
    with attach(model, RandomMask()):
        out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    embeds = model.get_input_embeddings()(tokens).clone().requires_grad_()
    with attach(model, RandomMask()):
        model(inputs_embeds=embeds).logits.square().mean().backward()
    sparse = embeds.grad.clone()
    embeds.grad = None
    with attach(model, RandomMask(), backend="masked"):
        model(inputs_embeds=embeds).logits.square().mean().backward()
    torch.testing.assert_close(sparse, embeds.grad, atol=TOLERANCE, rtol=0)


def test_masked_gates_carry_a_gradient(tiny):
    model = tiny("llama", "sdpa")
    gate = torch.full((1, 6), 0.7, requires_grad=True)

    class Soft(RandomMask):
        def gates(self, layer, hidden):
            return gate, gate

    with attach(model, Soft(), backend="masked"):
        model(ids(1, 6)).logits.square().mean().backward()
    assert gate.grad.abs().min() > 0


def test_skipped_work_is_not_computed(tiny):
    """The modules of a skipped sublayer are never called."""
    model = tiny("llama", "sdpa")
    called = []
    for index, layer in enumerate(decoder(model).layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda m, a, o, i=index: called.append((i, "attention", a[0].shape[-2]))
        )
        layer.mlp.gate_proj.register_forward_hook(
            lambda m, a, o, i=index: called.append((i, "mlp", a[0].shape[-2]))
        )
    with attach(model, GivenPlan(plan=plan_without(LAYERS, (0, 0), (1, 1), (3, 0), (3, 1)))):
        model(ids(1, 6))
    assert {c[:2] for c in called} == {(0, "mlp"), (1, "attention"), (2, "attention"), (2, "mlp")}
    called.clear()
    method = RandomMask()
    with attach(model, method) as trace:
        model(ids(1, 20))
    table = method.table[:20].sum(0)
    wanted = {(i, n): int(table[i, j]) for i in range(LAYERS) for j, n in enumerate(SUBLAYERS)}
    assert {(i, n): count for i, n, count in called} == wanted
    torch.testing.assert_close(trace.executed() * 20, table.double())


def test_refusals(tiny):
    model = tiny("llama", "sdpa")
    with (
        attach(model, RandomMask()),
        pytest.raises(UserError, match="already"),
        attach(model, RandomMask()),
    ):
        pass
    model(ids(1, 3))
    layer = decoder(model).layers[1]
    layer.forward = layer.forward
    with pytest.raises(UserError, match="forward of its own"), attach(model, RandomMask()):
        pass
    del layer.forward
    model.config.model_type = "no_such"
    try:
        with pytest.raises(UserError, match="supported are: bloom"), attach(model, RandomMask()):
            pass
    finally:
        model.config.model_type = "llama"
    with pytest.raises(UserError, match="backend"), attach(model, RandomMask(), backend="sparce"):
        pass
    with attach(model, RandomMask(), documents=["a", "b"]), pytest.raises(UserError, match="2 doc"):
        model(ids(3, 4))


@pytest.mark.parametrize(
    ("gate", "plan"),
    [
        (torch.ones(1, 2, dtype=torch.bool), None),
        (torch.ones(1, 5), None),
        (None, torch.ones(4, 2)),
    ],
)
def test_wrong_gates_are_named(tiny, gate, plan):
    class Wrong(DynamicDepthMethod):
        name, granularity, paper = "wrong", "token", "test"

        def start(self, context):
            return plan

        def gates(self, layer, hidden):
            return gate, gate

    model = tiny("llama", "sdpa")
    with attach(model, Wrong()), pytest.raises(TypeError, match="wrong: a (gate|plan) must be"):
        model(ids(1, 5))
    with attach(model, RandomMask()) as trace:  # the failed forward left nothing behind
        model(ids(1, 5))
    assert trace.totals()["tokens"] == 5


@pytest.mark.parametrize("length", [511, 512, 1100])
def test_long_causal_attention_in_parts(tiny, length):
    """Each part of the gathered queries reads the keys up to its last token, and no others."""
    model = tiny("llama", "sdpa", max_position_embeddings=2048)
    tokens = ids(1, length)
    method = RandomMask(rate=0.3)
    method.start = lambda context: (
        setattr(method, "context", context)
        or setattr(
            method,
            "table",
            torch.rand(2048, LAYERS, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            < method.rate,
        )
    )
    logits = []
    for backend in ("sparse", "masked"):
        with attach(model, method, backend=backend):
            logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_mask_may_be_written_to_between_blocks(tiny, family, inference):
    """A method may keep one mask and thin it in place; what ran before stays what it was."""

    class Thinning(RandomMask):
        def start(self, context):
            super().start(context)
            self.alive = torch.ones(
                context.batch, context.tokens, dtype=torch.bool, device=context.device
            )

        def gates(self, layer, hidden):
            self.alive &= super().gates(layer, hidden)[0]
            return self.alive, self.alive

    model, tokens, logits, executed = tiny(family), ids(3, 20), [], []
    for backend in ("sparse", "masked"):
        with (
            torch.inference_mode(inference),
            attach(model, Thinning(rate=0.8), backend=backend) as t,
        ):
            logits.append(model(tokens).logits)
            executed.append(t.executed())
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(*executed)
    assert (executed[0][1:] < executed[0][:-1]).all()


def test_autocast(tiny):
    model, tokens, logits = tiny("llama"), ids(3, 12), []
    for backend in ("sparse", "masked"):
        with torch.autocast("cpu", torch.bfloat16), attach(model, RandomMask(), backend=backend):
            logits.append(model(tokens).logits.float())
    assert (logits[0] - logits[1]).abs().mean() < 0.05
