"""What others do to a model stays possible while a method is attached: adapters, device maps,
caches of other kinds, compilation."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import GivenPlan, RandomMask, plan_without
from test_attach import LAYERS, METHODS, ids, incremental, padded
from test_flops import counted
from torch import nn
from transformers import DynamicCache, StaticCache

from dyndepth.common.errors import UserError
from dyndepth.models.blocks import blocks
from dyndepth.models.caches import cache_argument
from dyndepth.models.families import FAMILIES, family
from dyndepth.runtime.attach import attach

DOCUMENTS = ["a", "b", "c"]
SOME = ("masks", "masks_generation", "no_first_attention", "scattered", "by_document")


def both(model, method, tokens, **given):
    """Logits of the two backends."""
    logits = []
    for backend in ("sparse", "masked"):
        with attach(model, method, documents=DOCUMENTS, prompt_length=4, backend=backend):
            logits.append(model(tokens, **given).logits)
    return logits


# --- adapters ---------------------------------------------------------------------------------


def with_adapters(model, name):
    """Under peft, with adapters on the projections of attention and MLP that do something."""
    from peft import LoraConfig, get_peft_model

    record = FAMILIES[name]
    targets = {getattr(record, role) for role in ("query", "key", "value", "output")}
    targets.add(record.gate.rpartition(".")[2])
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=sorted(targets)))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = drawn.to(parameter)
    return wrapped.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@variants()
def test_adapters(tiny, family, attn):
    """Sparse equals masked, cached equals whole, and the adapters' FLOPs are counted."""
    stock, tokens = tiny(family, attn), ids(3, 12)
    plain = stock(tokens).logits
    model = with_adapters(stock, family)
    dense = model(tokens).logits
    assert not torch.allclose(dense, plain, atol=1e-2)
    for name in SOME[:4]:
        sparse, masked = both(model, METHODS[name], tokens)
        torch.testing.assert_close(sparse, masked, atol=TOLERANCE, rtol=0)
        assert not torch.allclose(sparse, dense, atol=1e-2)
        with attach(model, METHODS[name]) as trace:
            steps = incremental(model, tokens, prompt=6)
            trace.prompt_length = 6
            whole = model(tokens).logits
        torch.testing.assert_close(steps, whole, atol=TOLERANCE, rtol=0)
    if attn == "eager":
        with attach(model, RandomMask()) as trace:
            assert counted(lambda: model(tokens)) == sum(trace.flops.values())
    with attach(model, RandomMask(rate=1.0)):
        assert torch.equal(model(tokens).logits, dense)


# --- device maps ------------------------------------------------------------------------------


def dispatched(model, kind):
    """With accelerate's hooks on its modules, as a device map of several devices leaves it."""
    from accelerate import cpu_offload, dispatch_model

    if kind == "offloaded":
        return cpu_offload(model, execution_device=DEVICE)
    layers = f"{family(model).decoder}.{family(model).layers}"
    places = {
        name: str(DEVICE) for name, module in model.named_modules() if not list(module.children())
    }
    places = {name: place for name, place in places.items() if not name.startswith(layers)}
    places |= {f"{layers}.{index}": str(DEVICE) for index in range(LAYERS)}
    return dispatch_model(model, places, main_device=str(DEVICE), force_hooks=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("kind", ["dispatched", "offloaded"])
def test_device_maps(tiny, name, kind):
    tokens, stock = ids(3, 12), tiny(name, "sdpa")
    model = dispatched(tiny(name, "sdpa"), kind)
    layer = blocks(model)[0].layer
    assert kind == "offloaded" or "forward" in vars(layer)
    before, own = dict(vars(layer)), type(layer)
    for which in SOME:
        with attach(stock, METHODS[which], documents=DOCUMENTS) as trace:
            want = incremental(stock, tokens, prompt=6)
            flops = trace.totals()["total_flops"]
        with attach(model, METHODS[which], documents=DOCUMENTS) as trace:
            found = incremental(model, tokens, prompt=6)
            if kind == "dispatched":  # offloaded fused projections are called whole
                assert trace.totals()["total_flops"] == flops
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
        assert not torch.allclose(found, stock(tokens).logits, atol=1e-2)
    assert vars(layer).keys() == before.keys()
    assert type(layer) is own
    assert vars(layer).get("_old_forward") == before.get("_old_forward")
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)


def test_gates_follow_the_blocks_to_their_device():
    """What settles a gate moves it to where the block's tokens are; ``meta`` stands for another
    device, which can hold shapes alone."""
    from dyndepth.runtime.flops import Forward
    from dyndepth.runtime.gates import Settler

    forward = Forward(None, "prompt", 2, 3, 3, None, None, None, True, False, masked=True)
    settler = Settler(RandomMask(), forward, True, torch.device("cpu"))
    hidden = torch.empty(2, 3, 8, device="meta")
    gates = settler((torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)), hidden)
    for gate in gates.read():
        assert gate.device.type == "meta"


# --- caches -----------------------------------------------------------------------------------


@variants()
@pytest.mark.parametrize("kind", ["lazy", "configured", "static"])
def test_kinds_of_cache(tiny, family, attn, kind):
    """Steps over any kind of cache give what one forward gives."""
    model, tokens = tiny(family, attn), ids(3, 14)
    method = METHODS["masks"]
    name = cache_argument(model)
    make = {
        "lazy": DynamicCache,
        "configured": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=20),
    }[kind]
    try:
        model(tokens[:, :6], **{name: make()}, use_cache=True)
    except RuntimeError:
        pytest.skip(f"the stock {family} of this transformers can't run over a {kind} cache")
    past, parts = make(), []
    with attach(model, method) as trace:
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 14)):
            step = model(tokens[:, start:stop], **{name: past}, use_cache=True)
            parts.append(step.logits)
        trace.prompt_length = 6
        whole = model(tokens).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=TOLERANCE, rtol=0)


def test_static_caches_cannot_count_dropped_attention(tiny):
    model = tiny("llama")
    past = StaticCache(config=model.config, max_cache_len=20)
    with (
        attach(model, METHODS["no_first_attention"]),
        pytest.raises(UserError, match="can.*count tokens.*dynamic cache"),
    ):
        model(ids(1, 5), **{cache_argument(model): past}, use_cache=True)


# --- others -----------------------------------------------------------------------------------


def test_compiled_models_are_refused(tiny):
    model = torch.compile(tiny("llama"), backend="eager")
    with (
        pytest.raises(UserError, match="compile.*pass the original module"),
        attach(model, RandomMask()),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_two_methods_one_after_the_other(tiny, family):
    model, tokens = tiny(family), ids(3, 10)
    first = [both(model, METHODS[name], tokens)[0] for name in SOME]
    again = [both(model, METHODS[name], tokens)[0] for name in reversed(SOME)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@pytest.mark.rule
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_dense_kernel_gives_the_same(tiny, name, side):
    """Where gathering does not pay, all is computed and nothing else changes."""
    model = tiny("llama")
    tokens, mask, positions = padded(side)
    logits, totals = [], []
    for limits in (None, "always"):
        from dyndepth.runtime.limits import ALWAYS

        given = {"limits": ALWAYS} if limits else {}
        with attach(model, METHODS[name], documents=DOCUMENTS, **given) as trace:
            out = model(tokens, attention_mask=mask, position_ids=positions).logits
            logits.append(out[mask.bool()])
            totals.append(trace.totals())
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    padding = [total["by_cause"].pop("padding") for total in totals]
    assert totals[0] == totals[1]
    assert (padding[0] > padding[1]) == (name in ("masks", "by_document"))


@pytest.mark.rule
def test_the_ledger_counts_the_dense_kernel(tiny):
    model = tiny("llama", "eager")
    with attach(model, RandomMask()) as trace:
        assert counted(lambda: model(ids(3, 12))) == sum(trace.flops.values())
    with attach(model, RandomMask()) as trace:  # enough tokens to gather some
        assert counted(lambda: model(ids(3, 40))) == sum(trace.flops.values())


def test_other_attention_implementations_keep_the_meaning(tiny):
    """An attention that can't take explicit masks runs for all tokens, the MLP for some."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_by_another_name", sdpa_attention_forward)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa_by_another_name", sdpa_mask)
    model, tokens = tiny("llama"), ids(3, 12)
    want = both(model, RandomMask(), tokens)[0]
    model.set_attn_implementation("sdpa_by_another_name")
    found = both(model, RandomMask(), tokens)
    torch.testing.assert_close(found[0], want, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[1], want, atol=TOLERANCE, rtol=0)
    method = GivenPlan(plan=plan_without(LAYERS, (1, 0), (2, 1)))
    assert torch.equal(*both(model, method, tokens))


def test_hooks_of_others_on_modules_still_run(tiny):
    model, seen = tiny("llama"), []
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for index, layer in enumerate(module):
                layer.register_forward_hook(lambda m, a, out, i=index: seen.append(i))
    with attach(model, RandomMask()):
        model(ids(1, 6))
    assert seen == list(range(LAYERS))
