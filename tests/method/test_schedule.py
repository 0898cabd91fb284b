"""When: every boundary of a schedule, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from repr_det import Phase, RePrSchedule


def test_every_iteration_of_a_small_schedule():
    schedule = RePrSchedule(s1=3, s2=2, cycles=2)
    expected = [
        ("full", 0), ("full", 0), ("full", 0), ("sub", 0), ("sub", 0),
        ("full", 1), ("full", 1), ("full", 1), ("sub", 1), ("sub", 1),
        ("full", 2), ("full", 2),
    ]  # fmt: skip
    assert [tuple(schedule.phase(i)) for i in range(12)] == expected
    assert schedule.phase(10**9) == Phase("full", 2)


def test_numbers_of_numpy_count_like_pythons():
    schedule = RePrSchedule(np.int64(3), np.int32(2), np.int64(2))
    assert schedule == RePrSchedule(3, 2, 2)
    assert all(type(value) is int for value in (schedule.s1, schedule.s2, schedule.cycles))
    assert type(schedule.phase(np.int64(6)).cycle) is int


def test_shortest_schedule():
    schedule = RePrSchedule(1, 1, 1)
    assert [schedule.phase(i).name for i in range(3)] == ["full", "sub", "full"]
    assert schedule.end == 2


def test_sub_spans_are_the_iterations_in_s2():
    schedule = RePrSchedule(s1=4, s2=3, cycles=3)
    assert schedule.sub_spans() == [(4, 7), (11, 14), (18, 21)]
    inside = [i for i in range(40) if schedule.phase(i).name == "sub"]
    assert inside == [i for begin, end in schedule.sub_spans() for i in range(begin, end)]


def test_end_is_the_first_iteration_of_the_tail():
    schedule = RePrSchedule(s1=20, s2=10, cycles=3)
    assert schedule.end == 90
    assert schedule.phase(89) == ("sub", 2)
    assert schedule.phase(90) == ("full", 3)


@pytest.mark.parametrize("name", ["s1", "s2", "cycles"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "3", True, None])
def test_refuses_what_is_no_count(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        RePrSchedule(**{"s1": 2, "s2": 1, "cycles": 1, name: value})


def test_training_must_end_in_the_full_phase():
    schedule = RePrSchedule(s1=20, s2=10, cycles=3)
    schedule.check_fits(91)
    for max_iter in (1, 89, 90):
        with pytest.raises(ValueError, match=rf"3 \* \(20 \+ 10\) = 90 .* ends after {max_iter}"):
            schedule.check_fits(max_iter)
