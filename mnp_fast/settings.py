"""The one place that reads MNP_FAST_* environment variables.

It imports nothing but the standard library, so that setup.py can load this file alone, before the package is built.
`python -m mnp_fast` prints every variable with its meaning and the value in force.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable: its default, its meaning, and the values it may take (none listed: any)."""

    default: str
    meaning: str
    choices: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    "MNP_FAST_BACKEND": Variable(
        "auto",
        "run time: kernels to use; a forced backend that cannot run is an error, auto falls back to the reference",
        ("auto", "reference", "cpu", "triton", "cuda"),
    ),
    "MNP_FAST_CPU_ISA": Variable(
        "auto",
        "run time: instruction set of the CPU kernels; auto takes the widest that this processor has",
        ("auto", "scalar", "avx2", "avx512", "avx512_bf16"),
    ),
    "MNP_FAST_CUDA": Variable(
        "auto",
        "build time: on fails without nvcc, auto builds the CUDA kernels where nvcc is found, off never does",
        ("auto", "on", "off"),
    ),
    "MNP_FAST_CUDA_ARCHS": Variable(
        "80;90",
        "build time: CUDA architectures to build native code for; PTX of the newest is added",
    ),
}


def read(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Value of one variable of VARIABLES. ValueError names it and its choices where the value is none of them."""
    variable = VARIABLES[name]
    value = environ.get(name, "").strip().lower() or variable.default
    if variable.choices and value not in variable.choices:
        raise ValueError(f"environment variable {name}={value!r}: must be one of {', '.join(variable.choices)}")
    return value


def describe(environ: Mapping[str, str] = os.environ) -> list[tuple[str, str, str]]:
    """(name, value or what is wrong with it, meaning) of every variable, for the diagnosis; never raises."""
    rows = []
    for name, variable in VARIABLES.items():
        try:
            value = read(name, environ)
        except ValueError as error:
            value = f"INVALID ({error})"
        rows.append((name, value, variable.meaning))
    return rows
