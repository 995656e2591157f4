"""Plans that run together give what each gives alone, and share what they can."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICE, TOLERANCE, variants
from gating import GivenPlan, plan_without
from torch.utils.flop_counter import FlopCounterMode

from dyndepth.common.errors import UserError
from dyndepth.evaluation import plan_scoring
from dyndepth.evaluation.scoring import Group
from dyndepth.evaluation.scoring import score as score_alone
from dyndepth.models.blocks import blocks, decoder
from dyndepth.runtime import many_plans
from dyndepth.runtime.attach import attach

LAYERS = 4

every_variant = variants()
implementations = pytest.mark.parametrize("attn", ["sdpa", "eager"])
both_phases = pytest.mark.parametrize("phases", ["both", "generation"])


def some_plans(random: int = 12) -> torch.Tensor:
    """The dense plan, plans without ends, halves of blocks, duplicates, and random ones."""
    whole = [(layer, sublayer) for layer in range(LAYERS) for sublayer in (0, 1)]
    given = [
        plan_without(LAYERS),
        plan_without(LAYERS, (0, 0), (0, 1)),
        plan_without(LAYERS, (3, 0), (3, 1)),
        plan_without(LAYERS, *whole),
        plan_without(LAYERS, *[(layer, 0) for layer in range(LAYERS)]),
        plan_without(LAYERS, *[(layer, 1) for layer in range(LAYERS)]),
        plan_without(LAYERS, (0, 0), (2, 1)),
        plan_without(LAYERS, (2, 0), (3, 0)),
        plan_without(LAYERS, *whole[:6]),
        plan_without(LAYERS),
        plan_without(LAYERS, (2, 0), (3, 0)),
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(random, LAYERS, 2, generator=generator) < 0.5
    return torch.cat((torch.tensor(given), drawn))


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed)).to(
        DEVICE
    )


def some_groups() -> list[Group]:
    """Documents of several lengths, with continuations of several lengths."""
    shapes = [(5, (3, 1, 4)), (17, (1, 1)), (9, (6,)), (16, (2, 5, 2, 1)), (1, (1, 3)), (17, (2,))]
    numbers = iter(ids(1, 400, seed=1)[0].tolist())

    def take(count: int) -> list[int]:
        return list(itertools.islice(numbers, count))

    return [
        Group(f"document {number}", take(context), [take(length) for length in lengths])
        for number, (context, lengths) in enumerate(shapes)
    ]


def prefixes(plans: torch.Tensor) -> set[tuple[tuple[int, int], ...]]:
    """Everything that is executed, each sublayer named by all that came before it."""
    found = set()
    for plan in plans.tolist():
        done = [(at, sub) for at, gates in enumerate(plan) for sub in (0, 1) if gates[sub]]
        found |= {tuple(done[: stop + 1]) for stop in range(len(done))}
    return found


def alone(model, plan: torch.Tensor, group: Group, phases: str) -> list[tuple[list, list]]:
    """Log-probabilities and hits of each token, by continuations cut ever shorter."""
    cut = [tokens[:stop] for tokens in group.continuations for stop in range(1, len(tokens) + 1)]
    method = GivenPlan(plan=tuple(map(tuple, plan.tolist())), phases=phases)
    with attach(model, method) as trace:
        ((_, sums),) = score_alone(model, trace, [Group(group.document, group.context, cut)], 8)
    found, place = [], 0
    for tokens in group.continuations:
        own = sums[place : place + len(tokens)]
        place += len(tokens)
        logs = [now - before for before, now in itertools.pairwise([0.0, *[log for log, _ in own]])]
        found.append((logs, [greedy for _, greedy in own]))
    return found


def check(model, plans: torch.Tensor, phases: str, **settings) -> None:
    """Trie against attach, every plan and document."""
    groups = some_groups()
    seen = set()
    for index, results in plan_scoring.score(model, plans, groups, phases=phases, **settings):
        seen.add(index)
        for number, plan in enumerate(plans):
            expected = alone(model, plan, groups[index], phases)
            for (log, best), (logs, greedy) in zip(results, expected, strict=True):
                assert log.dtype == torch.float64
                assert best.dtype == torch.bool
                torch.testing.assert_close(
                    log[number], torch.tensor(logs).double(), atol=TOLERANCE, rtol=0
                )
                # score_alone's flags say whether all tokens so far are the likeliest
                assert best[number].cummin(0).values.tolist() == greedy
    assert seen == set(range(len(groups)))


@every_variant
@both_phases
def test_scores_equal_each_plan_alone(tiny, family, attn, phases):
    check(tiny(family, attn), some_plans(), phases)


@both_phases
@pytest.mark.parametrize("batch_tokens", [1, 600, 2**20])
def test_scores_do_not_depend_on_batches(tiny, phases, batch_tokens, monkeypatch):
    monkeypatch.setattr(many_plans, "_CALL_TOKENS", 40)
    monkeypatch.setattr(many_plans, "_LOGITS", 7 * 96)
    check(tiny("llama", "sdpa"), some_plans(), phases, batch_tokens=batch_tokens)


@both_phases
@implementations
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        (
            "qwen2",
            {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2},
        ),
    ],
)
def test_sliding_windows(tiny, phases, attn, family, changes):
    check(tiny(family, attn, **changes), some_plans(), phases)


@both_phases
def test_one_plan_alone(tiny, phases):
    for number in range(4):
        check(tiny("llama", "sdpa"), some_plans()[number : number + 1], phases)


@every_variant
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_streams_equal_each_plan_alone(tiny, family, attn, padded):
    model, plans, tokens = tiny(family, attn), some_plans(), ids(3, 12)
    mask, arguments = None, {}
    real = torch.ones(3, 12, dtype=torch.bool, device=DEVICE)
    if padded:
        real[1, :4] = real[2, :7] = False
        real = real if padded == "left" else real.flip(1)
        mask = real.long() if padded == "left" else real
        arguments = {
            "attention_mask": real.long(),
            "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
        }
    which, found = many_plans.streams(model, plans, tokens, mask=mask)
    assert found.shape == (len(set(which.tolist())), 3, 12, 32)
    assert len(found) == len({tuple(plan.flatten().tolist()) for plan in plans})
    for number, plan in enumerate(plans):
        with attach(model, GivenPlan(plan=tuple(map(tuple, plan.tolist())))):
            expected = decoder(model)(tokens, **arguments).last_hidden_state
        stream = found[which[number]]
        torch.testing.assert_close(stream[real], expected[real], atol=TOLERANCE, rtol=0)


@every_variant
def test_losses_equal_each_plan_alone(tiny, family, attn, monkeypatch):
    model, plans, tokens = tiny(family, attn), some_plans(), ids(5, 11)
    whole = many_plans.losses(model, plans, tokens)
    assert whole.shape == (len(plans), 5)
    assert whole.dtype == torch.float64
    for number, plan in enumerate(plans):
        with attach(model, GivenPlan(plan=tuple(map(tuple, plan.tolist())))):
            logits = model(tokens).logits[:, :-1]
        each = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0].double()
        torch.testing.assert_close(whole[number], each.mean(1), atol=TOLERANCE, rtol=0)
    monkeypatch.setattr(many_plans, "BATCH_TOKENS", 600)
    monkeypatch.setattr(many_plans, "_LOGITS", 7 * 96)
    torch.testing.assert_close(
        many_plans.losses(model, plans, tokens), whole, atol=TOLERANCE, rtol=0
    )


@implementations
def test_shared_sublayers_run_once(tiny, attn):
    model, plans, tokens = tiny("llama", attn), some_plans(40), ids(3, 12)
    computed = [0, 0]
    handles = []
    for block in blocks(model):
        for sublayer, norm in enumerate((block.attention_modules[0], block.mlp_modules[0])):

            def count(_, args, out, sublayer=sublayer):
                computed[sublayer] += out.shape[:-1].numel()

            handles.append(norm.register_forward_hook(count))
    many_plans.streams(model, plans, tokens)
    for handle in handles:
        handle.remove()
    ends = [prefix[-1][1] for prefix in prefixes(plans)]
    assert computed == [ends.count(0) * tokens.numel(), ends.count(1) * tokens.numel()]
    assert len(ends) < plans.sum()  # there was something to share


def test_scoring_costs_no_more_than_its_prefixes(tiny):
    """And less: after the last attention only what is scored goes on."""
    model, plans = tiny("llama", "eager"), some_plans(40)
    (group,) = some_groups()[3:4]
    length = len(group.context) + sum(len(tokens) - 1 for tokens in group.continuations)
    scored = 1 + length - len(group.context)
    weights = [
        sum(weight.numel() for weight in blocks(model)[0].layer.self_attn.parameters()),
        sum(weight.numel() for weight in blocks(model)[0].layer.mlp.parameters()),
    ]
    dense = 4 * length**2 * 32  # scores and values, 4 heads of 8
    shares = {0: 2 * length * weights[0] + dense, 1: 2 * length * weights[1]}
    most = sum(shares[prefix[-1][1]] for prefix in prefixes(plans))
    ends = {tuple(plan.flatten().tolist()) for plan in plans}
    head = 2 * 32 * 96 * scored * len(ends)
    with FlopCounterMode(display=False) as counter:
        list(plan_scoring.score(model, plans, [group]))
    assert counter.get_total_flops() - head < 0.9 * most
    # MLPs after the last attention see the scored positions alone, each prefix once.
    full = set()
    for prefix in prefixes(plans):
        attended = [stop for stop, (_, sublayer) in enumerate(prefix) if sublayer == 0]
        full |= {prefix[: stop + 1] for stop in range(attended[-1])} if attended else set()
    expected = sum(
        length if prefix in full else scored for prefix in prefixes(plans) if prefix[-1][1] == 1
    )
    seen = []
    handles = [
        block.mlp_modules[0].register_forward_hook(lambda _, __, out: seen.append(out.shape[0]))
        for block in blocks(model)
    ]
    list(plan_scoring.score(model, plans, [group]))
    for handle in handles:
        handle.remove()
    assert sum(seen) == expected


def test_dense_contexts_run_once(tiny):
    model, plans = tiny("llama", "eager"), some_plans(40)
    group = Group("only", list(range(3, 43)), [[5], [6]])
    with FlopCounterMode(display=False) as counter:
        list(plan_scoring.score(model, plans, [group], phases="generation"))
    with FlopCounterMode(display=False) as once:
        model(torch.tensor([group.context], device=DEVICE), logits_to_keep=1)
    assert counter.get_total_flops() == once.get_total_flops()


def test_the_model_is_restored(tiny):
    model, plans, tokens = tiny("llama", "sdpa"), some_plans(), ids(2, 9)
    before = model(tokens).logits
    classes = [type(module) for module in model.modules()]
    scores = plan_scoring.score(model, plans, some_groups(), batch_tokens=1)
    next(scores)
    assert torch.equal(model(tokens).logits, before)  # between the batches, too
    many_plans.streams(model, plans, tokens)
    many_plans.losses(model, plans, tokens)

    def fail(*_):
        raise RuntimeError("in the depth of a pass")

    handle = blocks(model)[2].mlp_modules[1].register_forward_pre_hook(fail)
    for run in (
        lambda: many_plans.streams(model, plans, tokens),
        lambda: list(plan_scoring.score(model, plans, some_groups())),
        lambda: list(plan_scoring.score(model, plans, some_groups(), phases="generation")),
    ):
        with pytest.raises(RuntimeError, match="depth"):
            run()
    handle.remove()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(tokens).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refusals(tiny):
    model, plans, tokens = tiny("llama", "sdpa"), some_plans(), ids(2, 9)
    for wrong in (plans.float(), plans[0], plans[:, :3], plans[..., :1]):
        with pytest.raises(UserError, match=r"plans must be bool \[plans, 4, 2\]"):
            many_plans.streams(model, wrong, tokens)
        with pytest.raises(UserError, match="plans must be bool"):
            list(plan_scoring.score(model, wrong, some_groups()))
    with pytest.raises(UserError, match="no plans"):
        many_plans.losses(model, plans[:0], tokens)
    with pytest.raises(UserError, match="2 tokens"):
        many_plans.losses(model, plans, tokens[:, :1])
    with pytest.raises(UserError, match="phases"):
        list(plan_scoring.score(model, plans, some_groups(), phases="prompt"))
    with attach(model, GivenPlan(plan=plan_without(LAYERS))):
        with pytest.raises(UserError, match="attached"):
            many_plans.streams(model, plans, tokens)
        with pytest.raises(UserError, match="attached"):
            list(plan_scoring.score(model, plans, some_groups()))
    layer = decoder(model).layers[1]
    layer.forward = layer.forward
    with pytest.raises(UserError, match="forward of its own"):
        many_plans.losses(model, plans, tokens)
    del layer.forward
    handle = blocks(model)[2].attention.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="the attention of block 2 has one"):
        many_plans.losses(model, plans, tokens)
    handle.remove()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="'sdpa' or 'eager'"):
        many_plans.losses(model, plans, tokens)


def test_no_documents(tiny):
    assert list(plan_scoring.score(tiny("llama", "sdpa"), some_plans(), [])) == []
