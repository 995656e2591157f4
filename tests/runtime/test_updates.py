"""What a method puts in the place of skipped updates, and its factors, wherever blocks run."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import GivenPlan, plan_without
from recording import StandIn
from test_attach import ids, incremental, padded
from test_attached import trained
from test_flops import counted
from torch import nn
from updating import Evicting, Masked, Reading, Scaled, Weighed, numbers

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.evaluation.evaluate import _let_choose
from dyndepth.export.plain import kept_blocks
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder, blocks, decoder
from dyndepth.runtime import execution
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs, obstacle
from dyndepth.runtime.limits import ALWAYS, Limits

LAYERS = 4
DOCUMENTS = ["a", "b", "c"]
PLAN = plan_without(LAYERS, (0, 0), (1, 1), (2, 0), (2, 1))
METHODS = {
    "reading": Reading(),
    "reading_generation": Reading(phases="generation"),
    "seldom": Reading(shift=4.0, open=()),
    "evicting": Evicting(),
    "masks": Masked(),
    "plan": Scaled(plan=PLAN),
    "plan_generation": Scaled(plan=PLAN, phases="generation"),
    "by_document": Scaled(
        plan={
            "a": plan_without(LAYERS, (0, 0), (0, 1)),
            "b": plan_without(LAYERS, (0, 0), (3, 1)),
            "c": plan_without(LAYERS),
        }
    ),
    "weighed": Weighed(plan=plan_without(LAYERS, (1, 0), (3, 1))),
    "weighed_generation": Weighed(plan=plan_without(LAYERS), phases="generation"),
}
COARSE = Limits(attention=0.3, mlp=0.3, tokens=0)
"""What most gates select is computed for all."""
UNASKED = Limits(attention=1.0, mlp=1.0, tokens=10_000)

RECORDED = [n for n, each in METHODS.items() if each.capturable and each.kv_policy != "evict"]
everything = pytest.mark.parametrize("name", METHODS)
some = pytest.mark.parametrize("name", ["reading", "evicting", "by_document", "weighed_generation"])


def near(found, want):
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


@some
@variants()
def test_sparse_equals_masked(tiny, family, attn, name):
    """Gathered, computed for all, and multiplied; and none of it is what comes without."""
    model, method = tiny(family, attn), METHODS[name]
    found = []
    for how in (
        {"backend": "masked"},
        {"limits": ALWAYS},
        {"limits": COARSE},
    ):
        with attach(model, method, documents=DOCUMENTS, prompt_length=4, **how):
            found.append(model(ids(3, 11)).logits)
    for each in found[1:]:
        near(each, found[0])
    silent = copy.copy(method)
    silent.__class__ = type("Silent", (type(method),), {"substitutes": False, "weighs": False})
    with attach(model, silent, documents=DOCUMENTS, prompt_length=4):
        assert not torch.allclose(model(ids(3, 11)).logits, found[0], atol=1e-2)


@pytest.mark.parametrize("limits", [ALWAYS, UNASKED], ids=["asked", "unasked"])
@everything
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_device_that_is_asked_early(tiny, monkeypatch, family, name, limits):
    model, method = tiny(family), METHODS[name]
    tokens, mask, positions = padded("left")
    found = []
    monkeypatch.setattr(execution, "asks_early", lambda device: True)
    for how in ({"backend": "masked"}, {"limits": limits}):
        with attach(model, method, documents=DOCUMENTS, **how):
            given = {"attention_mask": mask, "position_ids": positions}
            found.append(model(tokens, **given).logits[mask.bool()])
            found.append(model(ids(3, 1)).logits)
    near(found[2], found[0])
    near(found[3], found[1])


@pytest.mark.parametrize("name", ["reading_generation", "plan"])
@variants()
def test_cached_decode_equals_one_forward(tiny, family, attn, name):
    model, method, tokens = tiny(family, attn), METHODS[name], ids(3, 12)
    with attach(model, method, documents=DOCUMENTS) as trace:
        steps = incremental(model, tokens, prompt=5)
        trace.prompt_length = 5
        whole = model(tokens).logits
    near(steps, whole)


@everything
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_batch_equals_single(tiny, family, name, side):
    """Padding and batch mates change no logit and no bill."""
    model, method = tiny(family), METHODS[name]
    tokens, mask, positions = padded(side)
    prompts = torch.tensor([5, 4, 2])
    with attach(model, method, documents=DOCUMENTS, prompt_length=prompts) as trace:
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        together = trace.by_document()
        trace.reset()
        for row, document in enumerate(DOCUMENTS):
            real = mask[row].bool()
            trace.documents, trace.prompt_length = [document], int(prompts[row])
            near(batch[row, real], model(tokens[row : row + 1, real]).logits[0])
        assert trace.by_document() == together


@everything
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_ledger_equals_the_counter(tiny, family, name):
    model, method = tiny(family, "eager"), METHODS[name]
    tokens, mask, positions = padded("left")
    calls = [
        lambda: model(ids(3, 10)),
        lambda: model(tokens, attention_mask=mask, position_ids=positions),
        lambda: model.generate(ids(3, 5), max_new_tokens=3, min_new_tokens=3, do_sample=False),
    ]
    for how in ({"limits": ALWAYS}, {"limits": COARSE}, {"backend": "masked"}):
        for call in calls:
            with attach(model, method, documents=DOCUMENTS, **how) as trace:
                assert counted(call) == sum(trace.flops.values()), how
    with attach(model, method, documents=["a"], prompt_length=4, limits=ALWAYS) as trace:
        assert counted(lambda: model(ids(1, 10))) == sum(trace.flops.values())
        if method.phases == "both":
            assert trace.flops["padding"] == 0


def test_generations_in_a_row_equal_a_fresh_one(tiny):
    model, (tokens, mask, _) = tiny(), padded("left")
    how = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for method in METHODS.values():
        with attach(model, method, documents=DOCUMENTS):
            model.generate(tokens, **how)
            model(ids(3, 6, seed=5))
            second = model.generate(tokens, **how)
        with attach(model, method, documents=DOCUMENTS):
            assert torch.equal(model.generate(tokens, **how), second)


# --- against models that have nothing to do with it ---------------------------------------------


class Times(nn.Module):
    """In the place of an attention or an MLP: a multiple of what it reads."""

    def __init__(self, factor: float, attention: bool):
        super().__init__()
        self.factor, self.attention, self.layer_idx = factor, attention, 0

    def forward(self, hidden_states, **_):
        out = self.factor * hidden_states
        return (out, None) if self.attention else out


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_scaled_plan_is_a_stock_model_with_other_modules(tiny, family):
    """One of them runs its sublayers in parallel: both read the block's input."""
    model, method = tiny(family), METHODS["plan"]
    with attach(model, method):
        found = model(ids(2, 9), use_cache=False).logits
    stock = copy.deepcopy(model)
    for layer, runs in zip(decoder(stock).layers, PLAN, strict=True):
        index = [*decoder(stock).layers].index(layer)
        attention = "self_attn" if hasattr(layer, "self_attn") else "attention"
        for sublayer, (norm, name) in enumerate(
            [("input_layernorm", attention), ("post_attention_layernorm", "mlp")]
        ):
            if not runs[sublayer]:
                setattr(layer, norm, nn.Identity())
                scale = method.scales[index][sublayer]
                setattr(layer, name, Times(scale - 1, attention=sublayer == 0))
    near(found, stock(ids(2, 9), use_cache=False).logits)


def test_every_token_by_hand(tiny):
    """Gates, factors and matrices, one token and sublayer after the other."""
    model, method = tiny(), Reading()
    with attach(model, method) as trace:
        model(ids(1, 7))
        gates = trace.gates()[0]
    seen = []
    with attach(model, method):
        handle = decoder(model).norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(ids(1, 7))
        handle.remove()
    inner = decoder(model)
    hidden = inner.embed_tokens(ids(1, 7))
    angles = inner.rotary_emb(hidden, torch.arange(7, device=DEVICE)[None])
    for layer, block in enumerate(blocks(model)):
        factors = (hidden @ method.tensors["table"][layer])[..., 2:].sigmoid()
        for sublayer in (0, 1):
            if sublayer == 0:
                given = {"position_embeddings": angles, "attention_mask": None}
                branch = block.attention_branch(hidden, given)
            else:
                branch = block.mlp_branch(hidden)
            after = hidden.clone()
            for token in range(7):
                row = hidden[0, token]
                if gates[token, layer, sublayer]:
                    weight = 1.0 if (layer, sublayer) == (3, 1) else factors[0, token, sublayer]
                    after[0, token] = row + weight * branch[0, token]
                elif (layer, sublayer) != (1, 0):
                    after[0, token] = row + row @ method.tensors["matrices"][layer, sublayer]
            hidden = after
    near(seen[0], hidden)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    ("soft", "backend"), [(True, "masked"), (False, "masked"), (False, "sparse")]
)
def test_gradients_reach_what_is_trained(tiny, soft, backend, reentrant):
    """By checkpoints, too, over two forwards before one backward pass, which bills nothing."""
    found = []
    for mode in (None, reentrant):
        model = trained(tiny, "llama", mode)
        method = Reading(soft=soft, shift=0.5)
        method.tensors["table"] = numbers(LAYERS, 32, 4).to(DEVICE).requires_grad_(True)
        matrices = 0.1 * numbers(LAYERS, 2, 32, 32, seed=1).to(DEVICE)
        method.tensors["matrices"] = matrices.requires_grad_(True)
        with attach(model, method, backend=backend) as trace:
            loss = model(ids(2, 9), labels=ids(2, 9), use_cache=False).loss
            loss = loss + model(ids(2, 7, seed=1), labels=ids(2, 7), use_cache=False).loss
            before = trace.totals()
            loss.backward()
            assert trace.totals() == before
        found.append([loss.detach(), *(each.grad for each in method.tensors.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    table, matrices = found[0][1:]
    assert matrices[0].abs().max() > 0
    assert matrices[1, 0].abs().max() == 0  # nothing is put there
    assert (table[0, :, 2:].abs().amax(0) > 0).all()
    assert bool((table[0, :, :2].abs().amax(0) > 0).all()) is soft


def test_gradients_are_those_of_differences(tiny):
    """Of the logits' square by one number of a matrix, and of the table that gates and weighs."""
    model = copy.deepcopy(tiny("gpt2")).double()  # whose norms are not in float32
    method = Reading(soft=True)
    method.tensors["table"] = numbers(LAYERS, 32, 4).double().requires_grad_(True)
    method.tensors["matrices"] = (0.1 * numbers(LAYERS, 2, 32, 32)).double().requires_grad_(True)

    def loss():
        with attach(model, method, backend="masked", count=False):
            return model(ids(2, 9), use_cache=False).logits.square().mean()

    loss().backward()
    for name, place in (
        ("matrices", (0, 1, 3, 4)),
        ("table", (1, 5, 0)),
        ("table", (1, 5, 2)),
        ("table", (2, 6, 3)),
    ):
        tensor, values = method.tensors[name], []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor[place] += step
                values.append(loss())
                tensor[place] -= step
        difference = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(tensor.grad[place], difference, rtol=1e-5, atol=1e-8)


def test_updates_take_the_type_of_the_stream(tiny):
    model = copy.deepcopy(tiny()).to(torch.bfloat16)

    class Wide(Reading):
        def instead(self, layer, sublayer, rows):
            assert rows.dtype == torch.bfloat16
            found = super().instead(layer, sublayer, rows)
            return None if found is None else found.double()

        def weights(self, layer):
            return tuple(None if each is None else each.double() for each in super().weights(layer))

    for how in ({"backend": "masked"}, {"limits": ALWAYS}, {"limits": COARSE}):
        with attach(model, Wide(), **how):
            assert model(ids(2, 9)).logits.dtype == torch.bfloat16


# --- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2", "opt"])
def test_recorded_steps_equal_eager_steps(tiny, family, name, batch):
    model, method, tokens = tiny(family), METHODS[name], ids(batch, 14)
    assert obstacle(Decoder.of(model)) is None
    how = {"documents": DOCUMENTS[:batch]}
    with torch.inference_mode():
        with attach(model, method, **how) as eager:
            want = incremental(model, tokens, 6)
        with Graphs(StandIn() if DEVICE.type == "cpu" else None) as graphs:
            for _ in range(2):  # recorded, and found recorded
                with attach(model, method, mode=graphs, **how) as trace:
                    found = incremental(model, tokens, 6)
                near(found, want)
                assert trace.totals()["total_flops"] == eager.totals()["total_flops"]
                assert trace.by_document() == eager.by_document()
                assert torch.equal(trace.executed(), eager.executed())
            assert (graphs.steps, graphs.others) == (16, 0)


def test_a_recording_belongs_to_one_method(tiny):
    """Of equal plans: with other factors, with none; a dense plan's is anybody's."""
    model, tokens = tiny(), ids(1, 9)

    class Halved(Scaled):
        def instead(self, layer, sublayer, rows):
            return rows * -0.5

    with torch.inference_mode(), Graphs(StandIn() if DEVICE.type == "cpu" else None) as graphs:
        for kind in (Scaled, Halved, GivenPlan, Scaled):
            method = kind(plan=PLAN)
            with attach(model, method):
                want = incremental(model, tokens, 6)
            with attach(model, method, mode=graphs):
                near(incremental(model, tokens, 6), want)


def test_what_is_not_capturable_is_not_recorded(tiny):
    model = tiny()
    for name in ("masks", "weighed"):
        with Graphs(StandIn()) as graphs, pytest.raises(UserError, match="`instead` or `weights`"):
            attach(model, METHODS[name], mode=graphs).__enter__()
    with Graphs(StandIn()) as graphs, attach(model, GivenPlan(plan=PLAN), mode=graphs):
        pass


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda rows: rows[:1], r"float32 \[1, 32\]"),
        (lambda rows: rows.long(), r"int64"),
        (lambda rows: 0.5, "not 0.5"),
    ],
)
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_a_wrong_update_is_a_fault_of_the_method(tiny, wrong, said, backend):
    class Wrong(Masked):
        def instead(self, layer, sublayer, rows):
            return wrong(rows)

    model, faulty = tiny(), Wrong()
    with attach(model, faulty, backend=backend), pytest.raises(MethodFault, match=said) as caught:
        model(ids(2, 9))
    assert "of block 0 (" in str(caught.value)
    assert "Wrong.instead, " in str(caught.value)
    assert "test_updates.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.ones(2, 9), "not one torch.float32"),
        ((torch.ones(2, 8), None), r"not torch.float32 \[2, 8\]"),
        ((torch.ones(2, 9, dtype=torch.bool), None), "not torch.bool"),
        ((None, 0.5), "not 0.5"),
    ],
)
def test_a_wrong_factor_is_a_fault_of_the_method(tiny, wrong, said):
    class Wrong(Weighed):
        def weights(self, layer):
            return wrong

    model, faulty = tiny(), Wrong(plan=plan_without(LAYERS))
    with attach(model, faulty), pytest.raises(MethodFault, match=said) as caught:
        model(ids(2, 9))
    assert "test_updates.py:" in str(caught.value)


def test_plans_alone_do_not_stand_for_a_method_with_updates(tiny):
    """Candidates are tried as plans, and a plain checkpoint is one."""
    method = Scaled(plan=plan_without(LAYERS, (1, 0), (1, 1)))
    kept, reason = kept_blocks(method, torch.tensor(method.plan).double())
    assert (kept, "puts something in the place of" in reason) == ([], True)
    assert kept_blocks(GivenPlan(plan=method.plan), torch.tensor(method.plan).double())[0]

    class Choosing(Scaled):
        uses_labels = True

        def candidates(self):
            return torch.ones(2, LAYERS, 2, dtype=torch.bool)

    method = Choosing(plan=PLAN)
    with pytest.raises(TypeError, match="given_plan has candidates, .* plans alone"):
        _let_choose(SimpleNamespace(method=method), {})


def test_nobody_is_asked_who_says_nothing(tiny):
    """Both are looked at once, when the method is attached."""

    class Quiet(Scaled):
        asked = 0

        @property
        def substitutes(self):
            type(self).asked += 1
            return False

        def instead(self, layer, sublayer, rows):
            raise AssertionError

    assert not DynamicDepthMethod.substitutes.fget(GivenPlan(plan=PLAN))
    assert DynamicDepthMethod.substitutes.fget(Scaled(plan=PLAN))
    assert not GivenPlan(plan=PLAN).weighs
    assert Weighed(plan=PLAN).weighs
    model, method = tiny(), Quiet(plan=PLAN)
    with attach(model, GivenPlan(plan=PLAN)):
        want = model(ids(2, 9)).logits
    with attach(model, method):
        for _ in range(3):
            assert torch.equal(model(ids(2, 9)).logits, want)
    assert method.asked == 1
