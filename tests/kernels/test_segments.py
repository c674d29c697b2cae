import pytest
from d2l_kernels import Segments


def test_offsets_total_and_length():
    s = Segments.of(n for n in (3, 0, 2))
    assert (s.lengths, s.offsets, s.total, len(s)) == ((3, 0, 2), (0, 3, 3, 5), 5, 3)


@pytest.mark.parametrize(
    ("lengths", "common"), [((4, 4), 4), ((4, 5), None), ((0, 0), 0), ((7,), 7), ((), None)]
)
def test_equal_length(lengths, common):
    assert Segments(lengths).equal_length == common


def test_repeat_lays_the_whole_sequence_out_again():
    assert Segments((1, 2)).repeat(3).lengths == (1, 2, 1, 2, 1, 2)


def test_equality_is_by_lengths():
    assert Segments((1, 2)) == Segments.of([1, 2]) != Segments((2, 1))


def test_offsets_give_the_same_segments():
    assert Segments.from_offsets(Segments((3, 0, 2)).offsets) == Segments((3, 0, 2))


@pytest.mark.parametrize("offsets", [(0, 5, 3), (1, 4), (), (0, 3, 2, 6)])
def test_unsorted_and_overlapping_segments_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets must start at 0 and never fall, got \["):
        Segments.from_offsets(offsets)


def test_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"-1"):
        Segments((2, -1))
