"""Promise 2: new filters are orthogonal to the old values and to the survivors."""

from __future__ import annotations

import pytest
import torch

from repr_det import Reinit
from repr_det.method.layers import unit_rows
from repr_det.method.reinit import lengths_of, orthogonal_directions


def rows(count, dimension, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def new_filters(previous, survivors, source):
    """Directions for one set of filters, the dropped ones first."""
    both = torch.cat([previous, survivors])
    units, _ = unit_rows(both if both.dtype == torch.float64 else both.float())
    dropped = torch.arange(len(both)) < len(previous)
    return orthogonal_directions(units, dropped, source)


def largest_cosine(a, b):
    """In float64, zero rows left out."""
    a, b = (x.double()[x.double().norm(dim=1) > 0] for x in (a, b))
    if not len(a) or not len(b):
        return 0.0
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return (a @ b.T).abs().max().item()


def error_of_orthonormality(new):
    new = new.double()
    return (new @ new.T - torch.eye(len(new), dtype=torch.float64)).abs().max().item()


def near_duplicates(count, dimension, distance):
    base = rows(1, dimension, seed=1)
    return base + distance * rows(count, dimension, seed=2)


ROOM = {
    "plain": (rows(5, 64), rows(12, 64, 1)),
    "many blocks": (rows(100, 900, 3), rows(300, 900, 4)),
    "just fits": (rows(5, 22), rows(12, 22, 1)),
    "lengths differ by 1e12": (rows(4, 64), rows(12, 64, 1) * torch.logspace(-6, 6, 12)[:, None]),
    "tiny": (rows(4, 64) * 1e-25, rows(12, 64, 1) * 1e-25),
    "duplicates": (rows(4, 64), rows(3, 64, 1).repeat(4, 1)),
    "duplicates up to sign": (rows(4, 64), torch.cat([rows(6, 64, 1), -rows(6, 64, 1)])),
    "old among survivors": (rows(4, 64), torch.cat([rows(4, 64), rows(8, 64, 1)])),
    "nearly equal 1e-3": (rows(4, 64), near_duplicates(12, 64, 1e-3)),
    "nearly equal 1e-6": (rows(4, 64), near_duplicates(12, 64, 1e-6)),
    "zero ones make room": (rows(9, 16) * (torch.arange(9) < 5)[:, None], rows(2, 16, 1)),
    "half of them zero": (rows(6, 64) * torch.tensor([[1.0], [0.0]] * 3), rows(12, 64, 1)),
    "old all zero": (torch.zeros(4, 64), rows(12, 64, 1)),
    "no survivors": (rows(4, 64), torch.zeros(0, 64)),
    "dependent, more rows than fit": (rows(20, 64), rows(4, 64, 1).repeat(20, 1)),
    "survivors alone dependent": (rows(3, 16), rows(2, 16, 1).repeat(10, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOM)
def test_orthogonal_while_there_is_room(name):
    previous, survivors = ROOM[name]
    new = new_filters(previous, survivors, generator())
    assert new.shape == previous.shape
    # As they will stand in a float32 weight.
    new = new.float()
    assert largest_cosine(new, previous) <= 1e-5
    assert largest_cosine(new, survivors) <= 1e-5
    assert error_of_orthonormality(new) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "many blocks", "just fits", "nearly equal 1e-3"])
def test_orthogonal_in_float64(name):
    previous, survivors = (x.double() for x in ROOM[name])
    new = new_filters(previous, survivors, generator())
    assert new.dtype == torch.float64
    assert largest_cosine(new, torch.cat([previous, survivors])) <= 1e-12
    assert error_of_orthonormality(new) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_worked_on_in_float32(dtype):
    previous, survivors = (x.to(dtype) for x in ROOM["plain"])
    new = new_filters(previous, survivors, generator())
    assert largest_cosine(new, torch.cat([previous, survivors])) <= 1e-5


def test_new_filters_are_random_and_the_generator_decides():
    previous, survivors = ROOM["plain"]
    first, again, other = (new_filters(previous, survivors, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert largest_cosine(first, other) < 0.9


def test_new_filters_spread_over_the_null_space():
    """Over many draws each direction of the null space is met equally often."""
    previous, survivors = rows(2, 10), rows(4, 10, 1)
    draws = torch.cat(
        [new_filters(previous, survivors, generator(i)).double() for i in range(1500)]
    )
    taken = torch.cat([previous, survivors]).double()
    null = torch.linalg.svd(taken).Vh[6:]
    second = (draws @ null.T).T @ (draws @ null.T) / len(draws)
    # Two of four directions a draw: a quarter of unit length each; standard error about 0.006.
    assert (second - torch.eye(4, dtype=torch.float64) / 4).abs().max() < 0.03


# --- no room


def coverage(new, survivors):
    """How much the survivors' unit rows cover the space of the new ones, the least first."""
    units = torch.nn.functional.normalize(survivors.double(), dim=1)
    return torch.linalg.svdvals(units @ new.double().T).square().flip(0)


@pytest.mark.parametrize(("count", "kept", "dimension"), [(5, 40, 16), (15, 64, 16), (30, 90, 64)])
def test_without_room_the_least_covered_directions_come_first(count, kept, dimension):
    previous, survivors = rows(count, dimension), rows(kept, dimension, 1)
    new = new_filters(previous, survivors, generator())
    assert error_of_orthonormality(new) <= 1e-5
    units = torch.nn.functional.normalize(survivors.double(), dim=1)
    least = torch.linalg.svdvals(units).square().flip(0)[:count]
    torch.testing.assert_close(coverage(new, survivors), least, rtol=1e-4, atol=1e-5)


def test_null_space_of_the_survivors_comes_before_what_they_cover():
    """12 survivors in 16 dimensions leave 4 free; the other two are the least covered."""
    previous, survivors = rows(6, 16), rows(12, 16, 1)
    new = new_filters(previous, survivors, generator())
    assert (coverage(new[:4], survivors) <= 1e-10).all()
    found = coverage(new[4:], survivors)
    units = torch.nn.functional.normalize(survivors.double(), dim=1)
    least = torch.linalg.svdvals(units).square().flip(0)[:2]
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-5)
    assert error_of_orthonormality(new) <= 1e-5


def test_of_what_no_survivor_covers_the_old_values_cover_the_rest_least():
    """8 free dimensions, old values in 3 of them: 5 of 6 new filters stay clear of both."""
    survivors = rows(8, 16, 1)
    free = torch.linalg.svd(survivors.double()).Vh[8:]
    previous = (rows(3, 8, 2, torch.float64) @ free).repeat(2, 1).float()
    new = new_filters(previous, survivors, generator())
    assert largest_cosine(new[:5], previous) <= 1e-5
    assert largest_cosine(new[5:], previous) > 0.1
    assert largest_cosine(new, survivors) <= 1e-5


def test_coordinates_that_no_survivor_reads_are_free():
    """As after a return: survivors have zeros where returned channels come in."""
    survivors, previous = rows(40, 16, 1), rows(7, 16)
    survivors[:, [2, 5, 11]] = 0
    new = new_filters(previous, survivors, generator())
    outside = [i for i in range(16) if i not in (2, 5, 11)]
    assert new[:3, outside].abs().max() <= 1e-6
    units = torch.nn.functional.normalize(survivors.double(), dim=1)
    least = torch.linalg.svdvals(units).square().flip(0)[:7]
    torch.testing.assert_close(coverage(new, survivors), least, rtol=1e-4, atol=1e-5)
    assert error_of_orthonormality(new) <= 1e-5


def test_nearly_uncovered_direction_is_found_beyond_float32():
    """A direction that survivors cover by 1e-14 is not lost among larger ones."""
    survivors = rows(40, 16, 1, torch.float64)
    axis = torch.nn.functional.normalize(rows(1, 16, 9, torch.float64))
    survivors = (survivors - (survivors @ axis.T) @ axis).float()
    new = new_filters(rows(3, 16), survivors, generator())
    assert largest_cosine(new[:1].float(), survivors) <= 1e-5
    assert largest_cosine(new[:1], axis) >= 1 - 1e-6


@pytest.mark.parametrize("count", [16, 20, 40])
def test_more_filters_than_dimensions(count):
    """Orthonormal among themselves as far as dimensions allow: in sets of 16."""
    new = new_filters(rows(count, 16), rows(40, 16, 1), generator())
    assert new.shape == (count, 16)
    for begin in range(0, count, 16):
        assert error_of_orthonormality(new[begin : begin + 16]) <= 1e-5
    if count > 16:
        assert 0.05 < largest_cosine(new[:16], new[16:]) < 0.999


def test_one_dimension():
    new = torch.cat([new_filters(rows(3, 1), rows(4, 1, 1), generator(i)) for i in range(20)])
    assert torch.equal(new.abs(), torch.ones(60, 1))
    assert 15 < (new > 0).sum() < 45


@pytest.mark.parametrize("count", [1, 3, 4])
def test_where_nothing_is_taken_no_direction_is_preferred(count):
    """Mean and second moments of each entry, whose standard errors are 0.008 and 0.006."""
    nothing, source = torch.zeros(count, 4), generator()
    made = torch.stack([new_filters(nothing, nothing[:0], source) for _ in range(4000)])
    eye = torch.eye(count).expand(4000, -1, -1)
    torch.testing.assert_close(made @ made.mT, eye, rtol=0, atol=1e-5)
    assert made.mean(dim=0).abs().max() < 0.04
    entries = made.flatten(1)
    second = entries.T @ entries / 4000
    assert (second - torch.eye(4 * count) / 4).abs().max() < 0.03


@pytest.mark.parametrize("kept", [2, 4, 12], ids=["room", "just fits", "no room"])
def test_both_senses_of_a_direction_are_as_likely(kept):
    nothing, survivors = torch.zeros(2, 6), rows(kept, 6)
    draws = [new_filters(nothing, survivors, generator(i)) for i in range(1000)]
    assert torch.stack(draws).mean(dim=0).abs().max() < 0.1


# --- rounding and seeds


def orthonormal(count, dimension):
    return torch.linalg.qr(rows(dimension, count, dtype=torch.float64)).Q.T.float()


def unread(count, dimension):
    """Survivors that read two of three inputs, as after a return."""
    return rows(count, dimension, 1) * (torch.arange(dimension) % 3 > 0)


REGIMES = {
    "room": (rows(10, 128), rows(40, 128, 1)),
    "fits exactly": (rows(10, 64), rows(44, 64, 1)),
    "as many filters as dimensions": (rows(30, 100), rows(70, 100, 1)),
    "little room": (rows(20, 64), rows(55, 64, 1)),
    "no room": (rows(40, 64), rows(216, 64, 1)),
    "all directions but one": (rows(63, 64), rows(193, 64, 1)),
    "as many new ones as dimensions": (rows(64, 64), rows(192, 64, 1)),
    "more new ones than dimensions": (rows(70, 64), rows(186, 64, 1)),
    "one dimension": (rows(3, 1), rows(4, 1, 1)),
    "unread, room": (rows(20, 96), unread(60, 96)),
    "unread, no room": (rows(40, 96), unread(200, 96)),
    "duplicates": (rows(4, 64), rows(3, 64, 1).repeat(4, 1)),
    "duplicates, little room": (rows(8, 24).repeat(2, 1), rows(20, 24, 1).repeat(2, 1)),
    "old among survivors": (rows(4, 64), torch.cat([rows(4, 64), rows(8, 64, 1)])),
    "old all zero": (torch.zeros(6, 16), rows(12, 16, 1)),
    "all zero": (torch.zeros(6, 16), torch.zeros(12, 16)),
    "survivors orthonormal": (rows(20, 64), orthonormal(64, 64)),
    "survivors orthonormal and old as well": (orthonormal(64, 64)[:20], orthonormal(64, 64)[20:]),
    "survivors orthonormal twice": (rows(20, 64), orthonormal(64, 64).repeat(2, 1)),
    "half of the directions covered alike": (
        rows(20, 64), torch.cat([orthonormal(64, 64), 2 * orthonormal(64, 64)[:32]])
    ),
}  # fmt: skip


def nudged(filters):
    """Each entry changed by about 1e-7 of itself: as much as float32 rounds, or nearly so."""
    return (filters.double() * (1 + 1e-7 * rows(*filters.shape, 7, torch.float64))).float()


@pytest.mark.parametrize("name", REGIMES)
def test_new_filters_depend_on_the_seed_and_not_on_rounding(name):
    previous, survivors = REGIMES[name]
    new = new_filters(previous, survivors, generator(11))
    again = new_filters(nudged(previous), nudged(survivors), generator(11))
    other = new_filters(previous, survivors, generator(12))
    assert (new - again).norm(dim=1).max() <= 1e-5
    assert (new - other).norm(dim=1).max() >= 0.5


@pytest.mark.parametrize("shape", [(8, 24), (24, 16), (40, 16)])
def test_float64_filters_depend_on_rounding_in_float64_alone(shape):
    previous, survivors = rows(7, shape[1]).double(), rows(*shape, 1, torch.float64).repeat(2, 1)
    new = new_filters(previous, survivors, generator(11))
    again = new_filters(previous, survivors * (1 + 1e-15), generator(11))
    assert (new - again).norm(dim=1).max() <= 1e-10


# --- lengths and choices


def lengths(choice, previous, survivors):
    """Of new filters, from the lengths of old ones and of survivors."""
    both = torch.tensor([*previous, *survivors], dtype=torch.float64)
    return lengths_of(choice, both, torch.arange(len(both)) < len(previous))[
        : len(previous)
    ].tolist()


def test_lengths():
    assert lengths(Reinit(), [5, 2], [1, 3, 5]) == [3, 3]
    assert lengths(Reinit(scale=0.5), [5, 2], [1, 3, 5]) == [1.5, 1.5]
    assert lengths(Reinit(norm="previous"), [5, 2], [1, 3, 5]) == [5, 2]
    assert lengths(Reinit(), [5, 2], []) == [5, 2]


def test_no_new_filter_is_zero_where_a_length_is_known():
    assert lengths(Reinit(), [5, 0], [1, 0, 5]) == [3, 3]
    assert lengths(Reinit(norm="previous"), [5, 0], [1, 0, 5]) == [5, 3]
    assert lengths(Reinit(), [5, 0], [0, 0]) == [5, 0]


def test_lengths_of_several_sets_are_their_own():
    both = torch.tensor([[5.0, 1, 3], [5, 10, 30], [torch.inf, 1, 3], [2, 0, 0]])
    found = lengths_of(Reinit(), both.double(), torch.tensor([[True, False, False]] * 4))
    assert found[:, 0].tolist() == [2, 20, 2, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm", "mean"), ("gamma", "zero"), ("beta", "one"), ("scale", 0.0), ("scale", -1.0),
        ("scale", float("nan")), ("outgoing", -0.1), ("outgoing", 1.1), ("outgoing", float("nan")),
    ],
)  # fmt: skip
def test_choices_are_checked(key, value):
    with pytest.raises(ValueError, match=f"{key} is .*{value}"):
        Reinit(**{key: value})
