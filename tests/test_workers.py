"""Pieces side by side: results in order, errors, gradients as in the caller, cores shared out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mnp_fast.workers import side_by_side


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_pieces_run_at_the_same_time_with_one_core_each() -> None:
    meet = threading.Barrier(2, timeout=20)

    def piece(number: int) -> tuple[int, int, str]:
        meet.wait()  # passes only if the other piece runs too
        return number, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side([partial(piece, n) for n in range(2)])
    assert [number for number, _, _ in found] == [0, 1]
    assert [cores for _, cores, _ in found] == [1, 1]
    assert len({name for _, _, name in found} | {threading.current_thread().name}) == 3
    assert torch.get_num_threads() == 2
    assert torch.__config__.parallel_info().splitlines()[1].split()[-1] == "2"


@pytest.mark.usefixtures("two_threads")
def test_more_pieces_than_cores_run_one_after_the_other() -> None:
    names = side_by_side([lambda: threading.current_thread().name] * 3)
    assert names == [threading.current_thread().name] * 3


@pytest.mark.usefixtures("two_threads")
def test_inside_a_piece_there_are_no_more_pieces() -> None:
    def outer() -> list[str]:
        return side_by_side([lambda: threading.current_thread().name] * 2)

    for names in side_by_side([outer, outer]):
        assert len(set(names)) == 1


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_recorded_as_in_the_caller() -> None:
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert side_by_side([torch.is_grad_enabled] * 2) == [recording] * 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_comes_out_once_all_have_ended(bad: int) -> None:
    ended = []

    def piece(number: int) -> None:
        if number == bad:
            raise KeyError(number)
        ended.append(number)

    with pytest.raises(KeyError):
        side_by_side([partial(piece, n) for n in range(2)])
    assert ended == [1 - bad]
    assert side_by_side([lambda: 1, lambda: 2]) == [1, 2]
