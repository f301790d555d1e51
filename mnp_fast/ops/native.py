"""Loading of the compiled libraries, when an op first asks for one. What went wrong is kept, to be told when asked."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent.parent
_REMEDY = "build it with `pip install --no-build-isolation -e .` in the source folder, or install the package again"


@cache
def info_module() -> ModuleType | None:
    """mnp_fast._native, or None where it is not built."""
    try:
        return importlib.import_module("mnp_fast._native")
    except ImportError:
        return None


@cache
def load(name: str, left_out: str = "") -> str | None:
    """Loads mnp_fast/lib<name>.so, whose operators are then in torch.ops.<name>.

    Returns what went wrong, None if nothing did. `left_out`: why the build has no such library, where it says.
    """
    path = _FOLDER / f"lib{name}.so"
    if not path.exists():
        return f"{path.name} is not built ({left_out})" if left_out else f"{path.name} is not built: {_REMEDY}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def build_info() -> dict[str, str]:
    """What the native build holds; empty where it is not built."""
    module = info_module()
    info: dict[str, Any] = {} if module is None else module.build_info()
    return info
