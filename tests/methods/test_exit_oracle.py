"""The exit bound: at which depth each token leaves, and what is left of its prediction."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.methods.exit_oracle import ExitOracle, depths
from dyndepth.runtime.attach import attach

LAYERS = 8
TOKENS = 30


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (3, TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@torch.no_grad()
def wanted_depths(model, tokens, agree):
    """By loops over the stock model's hidden states; the last is through the final norm."""
    states = model(tokens, output_hidden_states=True).hidden_states
    best = [model.lm_head(model.model.norm(state)).argmax(-1) for state in states[1:-1]]
    best.append(model.lm_head(states[-1]).argmax(-1))
    found = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        for column in range(tokens.shape[1]):
            agrees = [bool(each[row, column] == best[-1][row, column]) for each in best]
            good = [
                depth
                for depth in range(1, LAYERS + 1)
                if (agrees[depth - 1] if agree == "first" else all(agrees[depth - 1 :]))
            ]
            found[row, column] = good[0]
    return found.cpu()


def executed(model, method, tokens, **kwargs):
    """Blocks that each token ran, both sublayers of each: int64 ``[batch, tokens]``."""
    with attach(model, method, **kwargs) as trace:
        model(tokens)
        gates = trace.gates()
    assert torch.equal(gates[..., 0], gates[..., 1])
    assert (gates[..., 0].long().diff(dim=-1) <= 0).all()  # who left does not come back
    return gates[..., 0].sum(-1)


@pytest.mark.parametrize("agree", ["first", "stays"])
@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_each_token_leaves_at_its_own_depth(model, tokens, agree, backend):
    method = ExitOracle(target_speedup=2, agree=agree, phases="both")
    found = executed(model, method, tokens, backend=backend)
    assert torch.equal(found, wanted_depths(model, tokens, agree))
    assert len(found.unique()) > 3


def test_first_is_never_later_than_stays(model, tokens):
    first, stays = (
        executed(model, ExitOracle(target_speedup=2, agree=agree, phases="both"), tokens)
        for agree in ("first", "stays")
    )
    assert (first <= stays).all()
    assert (first < stays).any()


def test_depths_by_hand():
    likeliest = torch.tensor([[7, 1, 2, 1], [7, 7, 7, 1], [7, 3, 7, 2], [7, 7, 7, 3]])[:, None]
    assert depths(likeliest, "first").tolist() == [[1, 1, 1, 3]]
    assert depths(likeliest, "stays").tolist() == [[1, 3, 1, 3]]


@pytest.mark.parametrize("agree", ["first", "stays"])
def test_a_token_alone_predicts_what_the_dense_model_does(model, agree):
    """Nothing to attend to but itself: leaving where it agrees changes no prediction."""
    alone = torch.arange(3, 93, device=DEVICE)[:, None]
    method = ExitOracle(target_speedup=2, agree=agree, phases="both")
    with attach(model, method) as trace:
        got = model(alone).logits.argmax(-1)
    assert torch.equal(got, model(alone).logits.argmax(-1))
    assert trace.executed().mean() < 0.9


def test_the_target_is_no_setting(model, tokens):
    assert not ExitOracle().budgeted
    assert ExitOracle().uses_labels
    found = [
        executed(model, ExitOracle(target_speedup=target, phases="both"), tokens)
        for target in (1.01, 3.0, 1.0)
    ]
    assert torch.equal(found[0], found[1])
    assert (found[2] == LAYERS).all()
    with attach(model, ExitOracle(target_speedup=1.0)) as trace:
        model(tokens)
    assert trace.flops["padding"] == 0  # nobody looked ahead


def test_prompts_keep_full_depth(model, tokens):
    method = ExitOracle(target_speedup=2, phases="generation")
    found = executed(model, method, tokens, prompt_length=10)
    assert (found[:, :10] == LAYERS).all()
    assert torch.equal(found[:, 10:], wanted_depths(model, tokens, "first")[:, 10:])
    assert (executed(model, method, tokens) == LAYERS).all()


def test_looking_ahead_is_not_billed(model, tokens):
    method = ExitOracle(target_speedup=2, phases="both")
    with attach(model, method) as trace:
        model(tokens)
    totals = trace.totals()
    assert totals["block_flops"] < totals["dense_block_flops"]
    assert trace.flops["router"] == trace.flops["readout"] == 0
    assert trace.flops["padding"] > totals["dense_block_flops"]
