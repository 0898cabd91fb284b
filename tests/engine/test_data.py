from __future__ import annotations

import pytest

from repr_det.engine.data import part_indices


def test_parts_share_no_image_and_are_nested():
    whole, nothing = part_indices(200)
    assert whole.tolist() == [*range(200)] and not len(nothing)
    rest, held_out = part_indices(200, 40)
    assert sorted([*rest.tolist(), *held_out.tolist()]) == [*range(200)]
    assert len(held_out) == 40 and held_out.tolist() != [*range(40)]
    assert {*held_out.tolist()} < {*part_indices(200, 60)[1].tolist()}
    larger = {*rest.tolist()}
    for share, count in ((0.5, 80), (0.25, 40), (0.1, 16), (1e-6, 1)):
        part, same = part_indices(200, 40, share)
        assert same.tolist() == held_out.tolist()
        assert part.tolist() == sorted(part.tolist())
        assert len(part) == count and {*part.tolist()} < larger
        larger = {*part.tolist()}


@pytest.mark.parametrize(
    ("held_out", "share", "sentence"),
    [
        (-1, 1.0, "DATASETS.HELD_OUT is -1, but the training set has 10 images"),
        (10, 1.0, "DATASETS.HELD_OUT is 10"),
        (0, 0.0, "DATASETS.TRAIN_SHARE is 0.0. Set a share above 0 and at most 1"),
        (0, 1.01, "DATASETS.TRAIN_SHARE is 1.01"),
        (0, float("nan"), "DATASETS.TRAIN_SHARE is nan"),
    ],
)
def test_out_of_range(held_out, share, sentence):
    with pytest.raises(ValueError, match=sentence):
        part_indices(10, held_out, share)
