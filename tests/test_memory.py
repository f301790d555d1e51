"""Kept memory: balanced, whatever happens inside."""

from __future__ import annotations

import pytest
import torch

from mnp_fast import memory


class Calls:
    def __init__(self) -> None:
        self.set: list[tuple[int, int]] = []
        self.trims = 0

    def mallopt(self, parameter: int, value: int) -> int:
        self.set.append((parameter, value))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trims += 1
        return 1


def test_set_once_and_put_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(memory, "_glibc", lambda: calls)

    def fails() -> None:
        assert dict(calls.set) == memory._KEEPING
        assert len(calls.set) == len(memory._KEEPING)
        raise KeyError

    with pytest.raises(KeyError), memory.kept(), memory.kept():
        fails()
    assert dict(calls.set[len(memory._KEEPING) :]) == memory._AFTER
    assert calls.trims == 1


def test_nothing_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.kept():
        assert torch.ones(3).sum() == 3


def test_glibc_takes_the_values() -> None:
    libc = memory._glibc()
    if libc is None:
        pytest.skip("this is not glibc")
    with memory.kept():
        for parameter, value in memory._KEEPING.items():
            assert libc.mallopt(parameter, value) == 1
    for parameter, value in memory._AFTER.items():
        assert libc.mallopt(parameter, value) == 1
