from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_koopman import MaskSet
from lightning_koopman.pruning.quantile import largest


def brute_force(values: np.ndarray, earlier: np.ndarray, count: int) -> np.ndarray:
    """Return a mask that prunes the ``count`` smallest; among equals, the first is pruned first."""
    sizes = np.where(earlier, np.abs(values.astype(np.float64)), -1.0)
    kept = np.ones(len(values), dtype=bool)
    kept[np.lexsort((np.arange(len(values)), sizes))[:count]] = False
    return kept


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum),
    share=st.floats(0, 1),
    levels=st.sampled_from([2, 5, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_it_keeps_what_brute_force_keeps(sizes, share, levels, dtype, seed):
    random = np.random.default_rng(seed)
    parts = [torch.from_numpy(random.integers(-levels, levels + 1, size) / levels).to(dtype) for size in sizes]
    earlier = [torch.from_numpy(random.random(size) < 0.8) for size in sizes]
    count = round(share * sum(sizes))
    starts = np.cumsum([0, *sizes])
    places = [lambda local, start=int(start): local + start for start in starts[:-1]]
    kept = largest(parts, places, earlier, count, lambda values: values)
    whole = torch.cat(parts).double().numpy(), torch.cat(earlier).numpy()
    np.testing.assert_array_equal(torch.cat(kept).numpy(), brute_force(*whole, count))


def test_tiny_and_huge_magnitudes_are_in_order():
    values = torch.tensor([1e-45, 0.0, 3e38, -1e-38, 1e-20, -3.4e38])
    masks = MaskSet.from_scores({"a": values}, sparsity=0.5)
    assert masks["a"].tolist() == [False, False, True, False, True, True]
    double = torch.tensor([1.0, 1.0 + 1e-15, 1.0 - 1e-15, 1e300], dtype=torch.float64)
    assert MaskSet.from_scores({"a": double}, sparsity=0.5)["a"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("pieces", [1, 7])
def test_pieces_make_no_difference(pieces, monkeypatch):
    monkeypatch.setattr("lightning_koopman.pruning.quantile.PIECE", pieces)
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept = MaskSet.from_scores({"a": values}, sparsity=0.3)["a"]
    np.testing.assert_array_equal(kept.numpy(), brute_force(values.numpy(), np.ones(50, dtype=bool), 15))


@pytest.mark.parametrize(
    ("scores", "amount", "kept"),
    [
        (torch.tensor([-128, 1, 2, 3], dtype=torch.int8), {"sparsity": 0.25}, [True, False, True, True]),
        (torch.tensor([2**24 + 1, 2**24, 2**24 + 2, 2**24 + 3]), {"sparsity": 0.25}, [True, False, True, True]),
        (torch.tensor([True, False, True, True]), {"sparsity": 0.25}, [True, False, True, True]),
        (torch.tensor([0.0, 1.0, 2.0], dtype=torch.float16), {"threshold": 1e-9}, [False, True, True]),
        (torch.tensor([0.0, 1.0, 2.0]), {"threshold": 1e-60}, [False, True, True]),
    ],
)
def test_scores_of_any_type_are_ranked_by_their_magnitude(scores, amount, kept):
    assert MaskSet.from_scores({"a": scores}, **amount)["a"].tolist() == kept


def test_masks_are_equal_if_their_bits_are():
    first, same, other = (MaskSet({"a": torch.tensor(bits)}) for bits in ([True, False], [True, False], [True, True]))
    assert first == same != other
    with pytest.raises(ValueError, match=r"within\['a'\] has shape \(2,\), but its scores \(4,\)"):
        MaskSet.from_scores({"a": torch.arange(4.0)}, sparsity=0.25, within=first)
