"""What the runtime does where the host runs ahead of the device, all of it on any device.

Counts are asked for early and read late, queries are laid among zeros, and short forwards compute
everything unasked: the results are those of one forward, and of what computes and multiplies.
"""

from __future__ import annotations

from functools import cached_property
from unittest.mock import patch

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import RandomMask
from test_attach import METHODS, ids, incremental, padded
from test_flops import CASES, counted
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dyndepth.models import selection
from dyndepth.models.families import FAMILIES
from dyndepth.runtime import execution
from dyndepth.runtime.attach import attach
from dyndepth.runtime.limits import ALWAYS, Limits

UNASKED = Limits(attention=1.0, mlp=1.0, tokens=10_000)
"""No forward is as long."""


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(execution, "asks_early", lambda device: True)


@pytest.mark.parametrize("limits", [ALWAYS, UNASKED], ids=["asked", "unasked"])
@pytest.mark.parametrize("name", ["masks", "attention_masks", "mlp_masks", "by_document"])
@variants()
def test_sparse_equals_masked(tiny, family, attn, name, limits):
    model, method = tiny(family, attn), METHODS[name]
    tokens, mask, positions = padded("left")
    forwards = [
        {"input_ids": ids(3, 11)},
        {"input_ids": tokens, "attention_mask": mask, "position_ids": positions},
    ]
    for given in forwards:
        if family == "bloom":
            given.pop("position_ids", None)
        found = []
        for backend in ("sparse", "masked"):
            documents = ["a", "b", "c"]
            with attach(model, method, documents=documents, backend=backend, limits=limits):
                found.append(model(**given).logits)
        real = mask.bool() if "attention_mask" in given else slice(None)
        torch.testing.assert_close(found[0][real], found[1][real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", ["masks", "masks_generation", "by_document"])
@pytest.mark.parametrize("family", FAMILIES)
def test_incremental_equals_one_forward(tiny, family, name, chunk):
    model, tokens = tiny(family), ids(3, 12)
    how = {"documents": ["a", "b", "c"], "prompt_length": 6}
    with attach(model, METHODS[name], **how):
        want = model(tokens).logits
    with attach(model, METHODS[name], **how):
        found = incremental(model, tokens, 6, chunk)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("limits", [ALWAYS, UNASKED], ids=["asked", "unasked"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma2"])
def test_ledger_equals_counter(tiny, family, name, limits):
    model = tiny(family)
    with (
        sdpa_kernel(SDPBackend.MATH),  # torch does not count its fused kernel of a CPU
        attach(model, CASES[name], documents=["a", "b", "c"], limits=limits) as trace,
    ):
        assert counted(lambda: model(ids(3, 10))) == sum(trace.flops.values())


class Launches(TorchDispatchMode):
    """Counts operators that would be kernels on a device, and reads that its host waits for."""

    FREE = {"view", "_unsafe_view", "transpose", "t", "unsqueeze", "expand", "slice", "select"}
    FREE |= {"permute", "detach", "alias", "unbind", "split", "as_strided", "squeeze", "empty"}
    FREE |= {"lift_fresh", "_reshape_alias", "unfold", "empty_strided", "chunk", "narrow"}
    READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}

    def __init__(self):
        super().__init__()
        self.launched, self.read, self.masked = 0, 0, 0

    def __enter__(self):
        """Lists are made of tensors without an operator."""
        stock = torch.Tensor.tolist

        def tolist(tensor):
            self.read += 1
            return stock(tensor)

        self.undo = patch.object(torch.Tensor, "tolist", tolist)
        self.undo.start()
        return super().__enter__()

    def __exit__(self, *fault):
        self.undo.stop()
        super().__exit__(*fault)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.READS:
            self.read += 1
        elif name not in self.FREE:
            self.launched += 1
        if "scaled_dot_product" in name:
            self.masked += (kwargs or {}).get("attn_mask") is not None
        return func(*args, **(kwargs or {}))


def launches(model, tokens, method=None, **how) -> Launches:
    with torch.no_grad(), Launches() as seen:
        if method is None:
            model(tokens, use_cache=True)
        else:
            with attach(model, method, **how):
                seen.launched = 0
                model(tokens, use_cache=True)
    return seen


class Given(RandomMask):
    """Masks that lie ready, one a block for both sublayers or one each."""

    def start(self, context):
        shape = (context.layers, 2, context.batch, context.tokens)
        generator = torch.Generator().manual_seed(0)
        self.masks = [tuple(pair) for pair in torch.rand(shape, generator=generator) < 0.5]

    def gates(self, layer, hidden):
        return self.masks[layer]


class Spaced(RandomMask):
    """A plan without every other block's MLP."""

    def start(self, context):
        plan = torch.ones(context.layers, 2, dtype=torch.bool)
        plan[::2, 1] = False
        return plan


@pytest.mark.skipif(DEVICE.type != "cpu", reason="what a CPU dispatches is what is counted")
@pytest.mark.parametrize("limits", [ALWAYS, UNASKED], ids=["asked", "unasked"])
def test_launches_and_waits(tiny, monkeypatch, limits):
    """Under masks a block waits at most once and launches at most 1.3 times what the stock one
    does; a plan waits for nothing; where nothing is padded, no kernel is chosen by a mask."""

    def index(self):
        return torch.nonzero_static(self.mask.flatten(), size=self.count)[:, 0]

    known = cached_property(index)
    known.__set_name__(selection.Selection, "index")
    monkeypatch.setattr(selection.Selection, "index", known)
    tokens = ids(1, 12)

    def a_block(method=None):
        few, many = (
            launches(tiny(num_hidden_layers=n), tokens, method, limits=limits) for n in (2, 6)
        )
        assert few.masked == many.masked == 0
        return (many.launched - few.launched) / 4, (many.read - few.read) / 4

    stock, no_reads = a_block()
    assert no_reads == 0
    launched, read = a_block(Given())
    assert read == (limits is ALWAYS)
    assert launched <= 1.3 * stock, (launched, stock)
    plans = [launches(tiny(num_hidden_layers=n), tokens, Spaced(), limits=limits) for n in (2, 6)]
    assert plans[0].read == plans[1].read == 1  # the plan itself, on the host


def test_the_answer_is_read_after_keys_and_values_are_on_their_way(tiny, monkeypatch):
    """The wait hides behind work that is queued in any case."""
    told = []
    model = tiny()
    read, first = selection.Counts.read, model.model.layers[0].self_attn.v_proj
    linear = type(first).forward

    def reading(self):
        told.append("read")
        return read(self)

    def projecting(self, states):
        if self is first:
            told.append("values")
        return linear(self, states)

    monkeypatch.setattr(selection.Counts, "read", reading)
    monkeypatch.setattr(type(first), "forward", projecting)
    with attach(model, RandomMask()):
        model(ids(2, 9))
    assert told[:2] == ["values", "read"]
