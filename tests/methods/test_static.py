"""Methods whose plan needs no text: dense, unified layer skipping, random skipping."""

from __future__ import annotations

import pytest
import torch

from dyndepth.common.errors import UserError
from dyndepth.method import ForwardContext
from dyndepth.methods.dense import Dense
from dyndepth.methods.random_skip import RandomSkip
from dyndepth.methods.uls import UnifiedLayerSkipping


def context(layers: int = 30, documents: list[str] | None = None, batch: int = 1) -> ForwardContext:
    return ForwardContext(
        layers=layers,
        batch=len(documents) if documents else batch,
        tokens=4,
        past_length=0,
        device=torch.device("cpu"),
        phase="prompt",
        valid=None,
        generation=None,
        documents=documents,
        head=lambda hidden: hidden,
        bill=lambda *_: None,
    )


def test_dense_keeps_everything():
    assert Dense().start(context()).all()
    assert Dense().max_speedup(30) == 1.0


@pytest.mark.parametrize(
    ("speedup", "kept"),
    [
        (2.0, [0, *range(2, 28, 2), 29]),
        (3.0, [0, 3, 6, 9, 12, 15, 18, 21, 24, 29]),
        (5.0, [0, 6, 12, 18, 24, 29]),
        (10.0, [0, 15, 29]),
        (1.25, [*range(23), 29]),
    ],
)
def test_uls_keeps_the_published_sets(speedup, kept):
    """The paper's walk on 30 blocks; at 2x it ends with ..., 24, 26, 29."""
    assert UnifiedLayerSkipping(target_speedup=speedup).kept_blocks(30) == kept


@pytest.mark.parametrize("layers", [4, 6, 12, 24, 30, 40])
@pytest.mark.parametrize("speedup", [1.0, 1.1, 1.25, 4 / 3, 1.5, 1.6, 1.9, 2.0])
def test_uls_walks_as_the_paper_says(layers, speedup):
    """From the ends, every interval-th block is added until enough are reserved."""
    wanted = int(layers / speedup + 1e-9)
    reserved, interval = {0, layers - 1}, int(layers / (wanted - 2 + 1))
    for block in range(1, layers - 1):
        if len(reserved) < wanted and block % interval == 0:
            reserved.add(block)
    method = UnifiedLayerSkipping(target_speedup=speedup)
    assert method.kept_blocks(layers) == sorted(reserved)
    assert method.start(context(layers))[:, 0].nonzero()[:, 0].tolist() == sorted(reserved)


@pytest.mark.parametrize("spacing", ["paper", "even"])
@pytest.mark.parametrize("layers", [4, 12, 24, 30, 32])
@pytest.mark.parametrize("speedup", [1.0, 1.1, 1.25, 1.5, 1.6, 2.0])
def test_uls_keeps_ends_and_count(spacing, layers, speedup):
    method = UnifiedLayerSkipping(target_speedup=speedup, spacing=spacing)
    kept = method.kept_blocks(layers)
    assert kept == sorted({0, *kept, layers - 1})
    assert len(kept) == int(layers / speedup + 1e-9)
    plan = method.start(context(layers))
    assert plan.sum(0).tolist() == [len(kept)] * 2


def test_uls_even_leaves_no_run_of_dropped_blocks():
    kept = UnifiedLayerSkipping(target_speedup=1.25, spacing="even").kept_blocks(30)
    assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) == 2


@pytest.mark.parametrize("method", [UnifiedLayerSkipping, RandomSkip])
def test_beyond_reach_is_refused(method):
    assert method(target_speedup=2.0).start(context(4)).sum() == 4
    with pytest.raises(UserError, match="at most 2, not 3"):
        method(target_speedup=3.0).start(context(4))


def test_random_skip_depends_on_document_and_seed_alone():
    method = RandomSkip(target_speedup=1.5)
    both = method.start(context(documents=["a", "b"]))
    swapped = method.start(context(documents=["b", "c", "a"]))
    assert torch.equal(both, swapped[[2, 0]])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[0], RandomSkip(target_speedup=1.5, seed=1).start(context())[0])
    assert both[:, [0, -1]].all()
    assert both.sum(1).tolist() == [[20, 20]] * 2


def test_random_skip_is_uniform_over_inner_blocks():
    documents = [str(n) for n in range(4000)]
    kept = RandomSkip(target_speedup=1.5).start(context(12, documents))[..., 0].float().mean(0)
    assert kept[0] == kept[-1] == 1
    torch.testing.assert_close(kept[1:-1], torch.full((10,), 0.6), atol=0.03, rtol=0)


def test_random_skip_without_documents_shares_one_set():
    plan = RandomSkip(target_speedup=2.0).start(context(batch=3))
    assert (plan == plan[:1]).all()
