"""`python -m mnp_fast` tells what is there, and never fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mnp_fast import __main__ as diagnosis
from mnp_fast import settings
from mnp_fast.ops import BACKENDS, native


def test_prints_everything_with_invalid_settings_too():
    done = subprocess.run(
        [sys.executable, "-m", "mnp_fast"],
        env=os.environ | {"MNP_FAST_BACKEND": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("torch", "native build", *BACKENDS, *settings.VARIABLES):
        assert word in done.stdout, word
    assert "INVALID" in done.stdout
    assert "cannot be told" not in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "mnp_fast"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "versions:\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_goes_on_past_what_is_broken(monkeypatch, capsys):
    def broken(*_):
        raise OSError("no such thing")

    monkeypatch.setattr(diagnosis, "why_not", broken)
    assert diagnosis.main([]) == 0
    printed = capsys.readouterr().out
    assert "cannot be told: OSError: no such thing" in printed
    assert "MNP_FAST_BACKEND" in printed


@pytest.mark.parametrize("info", [{}, {"cuda": "", "cuda_reason": "no nvcc was found when it was built"}])
def test_says_what_is_not_built(monkeypatch, capsys, info):
    if info:
        info = {"compiler": "c", "torch": "2", "torch_target": "2.10", "cpu_isas": "scalar", "cuda_archs": ""} | info
        monkeypatch.setattr(native, "info_problem", lambda: None)
        monkeypatch.setattr(native, "build_info", lambda: info)
    else:
        monkeypatch.setattr(native, "info_module", lambda: None)
    monkeypatch.setattr(diagnosis.cpu_backend, "usable_isas", lambda: ["scalar"])
    assert diagnosis.main([]) == 0
    assert ("no nvcc was found" if info else "is not built") in capsys.readouterr().out
