from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.distillation import best_match, make_map, skip_map, uniform_map


def test_known_maps() -> None:
    # TinyBERT's g(m) = 3 m, counted from 1; here from 0.
    assert uniform_map(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert uniform_map(6, 12) == tuple((i, 2 * i + 1) for i in range(6))
    assert uniform_map(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert uniform_map(1, 7) == ((0, 6),)
    assert uniform_map(2, 1) == ((0, 0), (1, 0))  # a student deeper than its teacher


def test_every_map_is_in_range_ascending_and_near_the_same_depth() -> None:
    seen = 0
    for students in range(1, 25):
        for teachers in range(1, 25):
            pairs = uniform_map(students, teachers)
            assert [student for student, _ in pairs] == list(range(students))
            chosen = [teacher for _, teacher in pairs]
            assert min(chosen) >= 0 and chosen[-1] == teachers - 1 and chosen == sorted(chosen)
            for student, teacher in pairs:
                exact = (student + 1) * teachers / students - 1
                assert abs(teacher - max(exact, 0)) <= 0.5 + 1e-9
            if students <= teachers:
                assert len(set(chosen)) == students, "each student layer has a teacher layer of its own"
            seen += 1
    assert seen == 24 * 24


def test_what_a_recipe_asks_for() -> None:
    sizes = {"student_layers": 3, "teacher_layers": 6}
    assert make_map("all", **sizes) == ((0, 1), (1, 3), (2, 5))
    assert make_map("last", **sizes) == ((2, 5),)
    assert make_map("skip", **sizes) == ((0, 1), (1, 3))
    assert make_map([[0, 5], [0, 0]], **sizes) == ((0, 5), (0, 0))


@pytest.mark.parametrize("pair", [[3, 0], [0, 6], [-1, 0], [0, -1], [10, 10]])
def test_layers_that_are_not_there_are_refused(pair: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"\[{pair[0]}, {pair[1]}\].*0 to 2.*0 to 5") as caught:
        make_map([[0, 0], pair], student_layers=3, teacher_layers=6)
    assert "\n" not in str(caught.value)


def test_a_third_and_two_thirds_are_rounded_to_the_nearest() -> None:
    for students, teachers in ((3, 4), (3, 8), (5, 12), (7, 24)):
        expected = tuple((i, math.floor((i + 1) * teachers / students + 0.5) - 1) for i in range(students))
        assert uniform_map(students, teachers) == expected


# ---- every k-th layer ----


def test_the_skip_maps_of_the_paper() -> None:
    # Sun et al. 2019: 12 layers to 6 take {2, 4, 6, 8, 10}, to 3 take {4, 8}; counted from 1 there.
    assert skip_map(6, 12) == tuple(enumerate((1, 3, 5, 7, 9)))
    assert skip_map(3, 12) == ((0, 3), (1, 7))
    assert skip_map(12, 12) == tuple((i, i) for i in range(11))
    assert skip_map(5, 12) == tuple(enumerate((1, 3, 5, 7)))  # every second


def test_skip_is_the_uniform_map_without_its_end_where_layers_divide() -> None:
    seen = 0
    for students in range(2, 13):
        for every in range(1, 5):
            assert skip_map(students, students * every) == uniform_map(students, students * every)[:-1]
            seen += 1
    assert seen == 44


@pytest.mark.parametrize("sizes", [(1, 12), (13, 12), (1, 1)])
def test_nothing_to_skip_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"2 to {sizes[1]} layers, not {sizes[0]}; use all or last") as caught:
        make_map("skip", student_layers=sizes[0], teacher_layers=sizes[1])
    assert "\n" not in str(caught.value)


# ---- the nearest layers ----


def best_sum(rows: list[list[float]], chosen: list[int], *, ordered: bool) -> float:
    """By trying everything."""
    matches = itertools.product(range(len(rows)), repeat=len(chosen))
    kept = [m for m in matches if not ordered or list(m) == sorted(m)]
    return min(sum(rows[j][i] for j, i in zip(m, chosen, strict=True)) for m in kept)


@given(
    st.integers(1, 5).flatmap(
        lambda teachers: st.tuples(
            st.lists(st.lists(st.integers(0, 9), min_size=teachers, max_size=teachers), min_size=1, max_size=5),
            st.sets(st.integers(0, teachers - 1), min_size=1),
            st.booleans(),
        )
    )
)
@settings(max_examples=300, deadline=None)
def test_no_match_is_better(drawn: tuple[list[list[int]], set[int], bool]) -> None:
    rows, chosen, ordered = drawn
    pairs = best_match(torch.tensor(rows, dtype=torch.float32), tuple(chosen), ordered=ordered)
    assert [teacher for _, teacher in pairs] == sorted(chosen)
    students = [student for student, _ in pairs]
    assert not ordered or students == sorted(students)
    assert sum(rows[j][i] for j, i in pairs) == best_sum(rows, sorted(chosen), ordered=ordered)


def test_a_match_out_of_order_is_made_in_order() -> None:
    distances = torch.tensor([[9.0, 0.0, 5.0], [0.0, 9.0, 5.0], [7.0, 1.5, 0.0]])
    assert best_match(distances, (0, 1, 2), ordered=False) == ((1, 0), (0, 1), (2, 2))
    assert best_match(distances, (0, 1, 2)) == ((1, 0), (2, 1), (2, 2))  # 0 + 1.5 + 0
    assert best_match(torch.zeros(4, 3), (2, 0)) == ((0, 0), (0, 2))


def test_layers_that_are_gone_are_never_matched() -> None:
    distances = torch.tensor([[0.5, 4.0], [float("inf")] * 2, [3.0, 5.0]])
    for ordered in (True, False):
        assert best_match(distances, (0, 1), ordered=ordered) == ((0, 0), (0, 1))
        with pytest.raises(ValueError, match="infinite"):
            best_match(torch.full((2, 2), float("inf")), (0,), ordered=ordered)


@pytest.mark.parametrize("chosen", [(2,), (-1,), (0, 5)])
def test_teacher_layers_that_are_not_there_are_refused(chosen: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layers 0 to 1") as caught:
        best_match(torch.zeros(3, 2), chosen)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="numbers"):
        best_match(torch.tensor([[float("nan"), 1.0]]), (0,))
