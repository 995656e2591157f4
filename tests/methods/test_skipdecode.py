"""SkipDecode: the schedule, which blocks run, rows of different prompts, steps by graphs."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from conftest import DEVICE, TOLERANCE
from recording import StandIn
from test_attach import ids, incremental, padded

from dyndepth.common.errors import UserError
from dyndepth.methods.skipdecode import SkipDecode
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs

LAYERS = 12


@pytest.mark.parametrize("variant", ["paper", "adaskip"])
@pytest.mark.parametrize("target", [1.0, 1.25, 1.5, 1.9])
@pytest.mark.parametrize("positions", [2, 7, 128])
def test_depth_never_rises_and_its_mean_is_the_target(variant, target, positions):
    reach = SkipDecode(variant=variant, positions=positions).max_speedup(LAYERS)
    method = SkipDecode(variant=variant, target_speedup=min(target, reach), positions=positions)
    depths = method.depths(LAYERS)
    assert len(depths) == positions
    assert all(first >= second for first, second in zip(depths, depths[1:], strict=False))
    assert 0 < depths[-1] <= depths[0] <= LAYERS
    mean = sum(depths) / positions
    # One number of skipped blocks more or less is half a block in the mean.
    near = 0.3 if variant == "adaskip" else 0.05
    want = LAYERS / method.target_speedup
    assert mean == pytest.approx(want, abs=near if positions > 100 else 0.5)


def test_the_formula():
    """max = L, and min such that the mean is the target; below twice as fast."""
    depths = SkipDecode(target_speedup=1.6, positions=50).depths(LAYERS)
    lowest = 2 * LAYERS / 1.6 - LAYERS
    assert depths == tuple(round(LAYERS - (LAYERS - lowest) * g / 49) for g in range(50))
    assert depths[0] == LAYERS
    lower = SkipDecode(target_speedup=1.6, positions=50, maximum=9).depths(LAYERS)
    assert (lower[0], lower[-1]) == (9, 6)
    # Beyond twice as fast the first tokens lose blocks, too.
    fast = SkipDecode(target_speedup=3.0, positions=50).depths(LAYERS)
    assert (fast[0], fast[-1]) == (6, 2)
    assert SkipDecode(target_speedup=6.0).depths(LAYERS) == (2,) * 256
    # AdaSkip's code with n blocks at most: those from 1 to k.
    found = SkipDecode(variant="adaskip", target_speedup=1.5, positions=512).depths(LAYERS)
    n = LAYERS - found[-1]
    assert found == tuple(LAYERS - min(n, ceil(t / 512 * (n - 1)) + 1) for t in range(512))


def test_one_position_is_one_plan(tiny):
    model, tokens = tiny(num_hidden_layers=6), ids(2, 12)
    method = SkipDecode(target_speedup=1.5, positions=1)
    assert method.depths(6) == (4,)
    with attach(model, method, prompt_length=5) as trace:
        model(tokens)
        gates = trace.gates()
    assert gates[:, :5].all()
    runs = torch.tensor([True, False, False, True, True, True])
    assert torch.equal(gates[:, 5:], runs[None, None, :, None].expand(2, 7, 6, 2))


def test_what_is_out_of_reach_is_said():
    assert SkipDecode(warm_up=2).max_speedup(12) == 4.0
    with pytest.raises(UserError, match="at most 4, not 4.5"):
        SkipDecode(warm_up=2, target_speedup=4.5).depths(12)
    with pytest.raises(UserError, match="maximum=6 of 12 blocks can't make a mean of 8"):
        SkipDecode(maximum=6, target_speedup=1.5).depths(12)
    reach = SkipDecode(variant="adaskip", positions=512)
    assert reach.max_speedup(12) == pytest.approx(12 / 6, rel=0.02)
    for bad in ({"positions": 0}, {"warm_up": 0}, {"variant": "adaskip", "maximum": 3}):
        with pytest.raises(ValueError, match="positions|warm_up"):
            SkipDecode(**bad)


@pytest.mark.parametrize("variant", ["paper", "adaskip"])
def test_which_blocks_run_in_steps_and_in_one_forward(tiny, variant):
    """Rows whose prompts differ in length; by an independent reference, token by token."""
    model = tiny(num_hidden_layers=6)
    method = SkipDecode(variant=variant, target_speedup=1.5, positions=6)
    depths = method.depths(6)
    tokens, mask, positions = padded("left")
    prompts = torch.tensor([5, 4, 2])
    with attach(model, method, prompt_length=prompts) as trace:
        model(tokens, attention_mask=mask, position_ids=positions)
        gates = trace.gates()
    for row in range(3):
        for column in range(12):
            age = int(positions[row, column]) - int(prompts[row])
            want = [True] * 6
            if not mask[row, column]:
                want = [False] * 6
            elif age >= 0:
                depth = depths[min(age, 5)]
                want = [True] + [False] * (6 - depth) + [True] * (depth - 1)
            assert gates[row, column, :, 0].tolist() == want
    assert torch.equal(gates[..., 0], gates[..., 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_by_graphs_equal_eager_steps(tiny, side):
    model, name = tiny(), cache_argument(tiny())
    method = SkipDecode(target_speedup=1.5, positions=4)
    tokens, mask, positions = padded(side)
    more = ids(3, 5, seed=3)

    def run():
        out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
        seen, found = mask, []
        for step in range(5):
            seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
            given = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1)[:, -1:]}
            past = {name: cache_of(out)}
            out = model(more[:, step : step + 1], use_cache=True, **given, **past)
            found.append(out.logits)
        return torch.cat(found, 1)

    with torch.inference_mode():
        with attach(model, method) as eager:
            want = run()
        recorder = StandIn() if DEVICE.type == "cpu" else None
        with Graphs(recorder) as graphs, attach(model, method, mode=graphs) as trace:
            found = run()
            assert (graphs.steps, graphs.others) == (5, 0)
    torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    assert trace.totals("generation")["block_flops"] == eager.totals("generation")["block_flops"]


class Rising(SkipDecode):
    """The schedule turned round: later tokens run more blocks."""

    def depths(self, layers):
        return tuple(reversed(super().depths(layers)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_evicting_is_projecting(tiny, side):
    """In one forward and in steps; not under a depth that rises."""
    model = tiny(num_hidden_layers=6)
    tokens, mask, positions = padded(side)

    def logits(kind, kv):
        method = kind(target_speedup=1.5, positions=6, kv=kv)
        assert method.kv_policy == kv
        with attach(model, method, prompt_length=torch.tensor([5, 3, 2])) as trace:
            whole = model(tokens, attention_mask=mask, position_ids=positions).logits
            trace.prompt_length = None
            steps = incremental(model, ids(2, 14), prompt=4)
        return whole[mask.bool()], steps

    for kind, alike in ((SkipDecode, True), (Rising, False)):
        pairs = zip(logits(kind, "project"), logits(kind, "evict"), strict=True)
        gaps = [float((one - other).abs().max()) for one, other in pairs]
        assert all(gap <= 2e-6 if alike else gap > 1e-2 for gap in gaps), gaps


def test_nobody_reads_what_skipped_tokens_keep(tiny):
    """Keys and values of skipped attentions may be anything; under a depth that rises, not."""
    model, tokens = tiny(num_hidden_layers=6), ids(2, 16)
    name = cache_argument(model)

    def gap(method):
        logits = []
        for spoilt in (False, True):
            with attach(model, method) as trace:
                out = model(tokens[:, :4], use_cache=True)
                for place in range(4, 16):
                    past = cache_of(out)
                    out = model(tokens[:, place : place + 1], use_cache=True, **{name: past})
                    skipped = ~trace.gates()[0, 0, :, 0]
                    for layer in skipped.nonzero()[:, 0].tolist() if spoilt else []:
                        past.layers[layer].keys[:, :, -1] = 9.0
                        past.layers[layer].values[:, :, -1] = 9.0
            logits.append(out.logits)
        return float((logits[0] - logits[1]).abs().max())

    assert gap(SkipDecode(target_speedup=1.5, positions=10)) < 1e-6
    assert gap(Rising(target_speedup=1.5, positions=10)) > 1e-2
