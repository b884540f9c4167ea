from __future__ import annotations

import math

import pytest

from hfcompress.distillation import make_map, uniform_map


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
