"""Loading of the compiled libraries, when an op first asks for one. What went wrong is kept, to be told when asked."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent.parent
_HOW = "`pip install --no-build-isolation -e .` in the source folder, or install the package again"
_REMEDY = f"build it with {_HOW}"
_OTHER = "is built from another version of the sources"
_INFO = "mnp_fast._native"

INTERFACES = {"mnp_fast_cpu": "be57f11e", "mnp_fast_cuda": "e05ceb5f"}
"""`digest` of the operators that each library must have, so that one with other operators is not called. Whether what
they compute is that of these sources `make` sees to."""

_FUNCTIONS = ("build_info", "usable_isas", "isa_code")
_ENTRIES = ("compiler", "torch", "torch_target", "cpu_isas", "cuda", "cuda_archs", "cuda_reason")
_unusable: dict[str, str] = {}


@cache
def info_module() -> ModuleType | None:
    """mnp_fast._native, or None where it is not built, does not load, or is not for these sources."""
    try:
        module = importlib.import_module(_INFO)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _refuse(_INFO, f"cannot be loaded ({error})")
        return None
    if all(hasattr(module, name) for name in _FUNCTIONS) and set(_ENTRIES) <= set(module.build_info()):
        return module
    _refuse(_INFO, _OTHER)
    return None


def info_problem() -> str | None:
    """Why there is no `info_module`, None if there is."""
    if info_module() is not None:
        return None
    return _unusable.get(_INFO, f"{_INFO} is not built for this Python: {_REMEDY}")


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
        return _refuse(path.name, f"cannot be loaded ({' '.join(str(error).split())})")
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{name}::"))
    return None if digest(schemas) == INTERFACES[name] else _refuse(path.name, _OTHER)


def digest(schemas: Iterable[torch.FunctionSchema]) -> str:
    """Eight hexadecimal digits of the operators' names, arguments and numbers of results, in whatever order."""
    # Not of their text: its form is torch's own, and one library serves many versions of it.
    lines = [
        f"{s.name.rpartition('::')[2]}({', '.join(a.name for a in s.arguments)}) -> {len(s.returns)}" for s in schemas
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]


def unusable() -> list[str]:
    """What has been found so far that is there but does not load or is built from other sources, with the remedy."""
    return list(_unusable.values())


def build_info() -> dict[str, str]:
    """What the native build holds; empty where it is not built."""
    module = info_module()
    info: dict[str, Any] = {} if module is None else module.build_info()
    return info


def _refuse(name: str, problem: str) -> str:
    _unusable[name] = f"{name} {problem}: rebuild with {_HOW}"
    return _unusable[name]
