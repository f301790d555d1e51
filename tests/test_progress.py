"""Progress: a bar in a terminal, one line a stage in a pipe, nothing where switched off."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mnp_fast.progress import Progress


def run(terminal: bool, enabled: bool = True, broken: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=110, color_system=None)
    with Progress(enabled, console) as progress:
        progress.stage("suppress")
        progress.update(2, loss=2.5, accuracy=0.25)
        progress.update(1, loss=3.0)
        progress.stage("masks", 10)
        progress.update(4, loss=0.5)
        if broken:
            raise KeyboardInterrupt
    return text.getvalue()


def test_a_pipe_gets_one_line_a_stage() -> None:
    lines = run(terminal=False).splitlines()
    assert [line.split()[0] for line in lines] == ["suppress", "masks"]
    assert "loss 3.000  accuracy 0.250" in lines[0]


def test_a_terminal_gets_bars_with_values_and_time() -> None:
    shown = run(terminal=True)
    for text in ("suppress", "3/3", "loss 3.000  accuracy 0.250", "4/4", "left"):
        assert text in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_switched_off_it_is_silent(terminal: bool) -> None:
    assert run(terminal, enabled=False) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_an_interrupt_passes_through(terminal: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(terminal, broken=True)
