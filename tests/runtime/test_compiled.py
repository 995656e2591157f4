"""What torch.compile makes of an attached model gives what the attached model gives."""

from __future__ import annotations

import pytest
import torch
from conftest import TOLERANCE
from gating import GivenPlan, RandomMask, plan_without
from test_attach import ids
from transformers import CompileConfig

from dyndepth.models.blocks import decoder
from dyndepth.runtime.attach import attach

METHODS = {
    "plan": GivenPlan(plan=plan_without(4, (1, 0), (2, 1)), target_speedup=1.5),
    "masks": RandomMask(target_speedup=1.5),
}


def wrapped(model, tokens):
    return torch.compile(model, backend="eager")(tokens).logits


def in_place(model, tokens):
    model.compile(backend="eager")
    return model(tokens).logits


def decoder_in_place(model, tokens):
    decoder(model).compile(backend="eager")
    return model(tokens).logits


def blocks_in_place(model, tokens):
    for layer in decoder(model).layers:
        layer.compile(backend="eager")
    return model(tokens).logits


def function_around(model, tokens):
    return torch.compile(lambda read: model(read).logits, backend="eager")(tokens)


@pytest.fixture(autouse=True)
def _forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how", [wrapped, in_place, decoder_in_place, blocks_in_place, function_around]
)
def test_compiled_while_attached(tiny, how):
    model, tokens, name = tiny(), ids(2, 9), "masks"
    with torch.no_grad():
        dense = model(tokens).logits
        with attach(model, METHODS[name]):
            want = model(tokens).logits
        assert not torch.allclose(want, dense, atol=1e-2)
        with attach(model, METHODS[name]) as trace:
            for count in (1, 2):
                found = how(model, tokens) if count == 1 else model(tokens).logits
                torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
                assert trace.totals()["tokens"] == 18 * count
        torch.testing.assert_close(model(tokens).logits, dense, atol=TOLERANCE, rtol=0)


def test_a_wrapper_that_was_compiled_before_follows(tiny):
    """What was compiled of the stock model does not run in the place of the attached one."""
    model, tokens, name = tiny(), ids(2, 9), "plan"
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(tokens).logits
        with attach(model, METHODS[name]) as trace:
            want, found = model(tokens).logits, compiled(tokens).logits
        assert trace.totals()["tokens"] == 36
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(compiled(tokens).logits, dense, atol=TOLERANCE, rtol=0)


def test_a_graph_of_the_whole_cannot_be_had(tiny):
    model = tiny()
    with (
        attach(model, METHODS["plan"]),
        pytest.raises(torch._dynamo.exc.Unsupported),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(ids(1, 4))


def test_generate_that_compiles_by_itself(tiny):
    """transformers does so over a static cache, on a GPU unless told otherwise."""
    model, prompt = tiny(), ids(1, 5)
    how = CompileConfig(backend="eager", fullgraph=False)
    how._compile_all_devices = True
    said = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    token_rule = RandomMask(target_speedup=1.5)
    token_rule.__class__ = type("Projecting", (RandomMask,), {"kv_policy": "project"})
    with attach(model, token_rule) as trace:
        want = model.generate(prompt, **said)
        tokens = trace.totals()["tokens"]
        found = model.generate(prompt, compile_config=how, **said)
        assert trace.totals()["tokens"] == 2 * tokens
    assert torch.equal(found, want)
