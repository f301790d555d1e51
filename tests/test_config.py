"""PruneConfig: every field checked and explained, nothing can be changed afterwards."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest

from mnp_fast import ConfigError, PruneConfig
from mnp_fast.errors import MnpFastError

FIELDS = [field.name for field in fields(PruneConfig) if field.name != "precision"]  # numbers
WHOLE = [name for name in FIELDS if type(getattr(PruneConfig(), name)) is int]


def explanations() -> dict[str, str]:
    """The text under each field, from the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(PruneConfig)).body if isinstance(node, ast.ClassDef))
    found = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[node.target.id] = text if isinstance(text, str) else ""
    return found


def refused(**values: Any) -> str:
    """The message; it names the field, and it is of our family and a ValueError."""
    with pytest.raises(ConfigError) as caught:
        PruneConfig(**values)
    assert isinstance(caught.value, MnpFastError)
    assert isinstance(caught.value, ValueError)
    assert next(iter(values)) in str(caught.value)
    return str(caught.value)


def test_the_defaults_stand() -> None:
    config = PruneConfig()
    assert config == PruneConfig(**asdict(config))
    assert config.suspicion_score <= config.evidence_score
    optimised = {"suppression_epochs", "perturbations", "perturbation_steps", "mask_steps", "finetune_epochs"}
    assert set(WHOLE) == {"batch_size", "looks"} | optimised


def test_precision() -> None:
    for value in ("auto", "float32", "bfloat16"):
        assert PruneConfig(precision=value).precision == value
    for value in ("float16", "", None, 1):
        assert "one of auto, float32, bfloat16" in refused(precision=value)


@pytest.mark.parametrize("name", FIELDS)
def test_types(name: str) -> None:
    for value in (True, False, None, "1", [1], 1j):
        assert type(value).__name__ in refused(**{name: value})
    if name in WHOLE:
        value = float(getattr(PruneConfig(), name))
        assert "whole number" in refused(**{name: value})
        assert "whole number" in refused(**{name: math.nan})


@pytest.mark.parametrize("name", FIELDS)
def test_ranges(name: str) -> None:
    for value in (-1,) if name in WHOLE else (-1, -1e-6, math.nan, math.inf, -math.inf):
        assert "must lie between" in refused(**{name: value})
    # The range that the explanation gives is the one that is checked.
    given = re.search(r"in ([\[(])0, 1([\])])", explanations()[name])
    if given or name.endswith("_score"):
        refused(**{name: 1.5})
    if given:
        for value, bracket, closed in ((0, given[1], "["), (1, given[2], "]")):
            if bracket == closed:
                assert getattr(PruneConfig(**{name: value}), name) == value
            else:
                refused(**{name: value})


def test_the_least_of_each() -> None:
    for name in ("looks", "suppression_epochs", "perturbations", "perturbation_steps", "mask_steps"):
        refused(**{name: 0})
        assert getattr(PruneConfig(**{name: 1}), name) == 1
    refused(batch_size=1)  # batch statistics need two
    for name in ("suppression_rate", "evidence_size", "perturbation_size", "mask_rate", "finetune_rate"):
        refused(**{name: 0})
    for name in ("penalty", "weight_decay", "finetune_epochs"):
        assert getattr(PruneConfig(**{name: 0}), name) == 0


def test_a_number_too_large_for_a_float_is_refused() -> None:
    for name in ("penalty", "mask_steps"):
        refused(**{name: 10**400})


def test_whole_numbers_do_for_numbers() -> None:
    assert PruneConfig(alpha=1, weight_decay=0).alpha == 1


def test_suspicion_comes_before_evidence() -> None:
    assert "evidence_score" in refused(suspicion_score=0.8, evidence_score=0.7)
    assert PruneConfig(suspicion_score=0.7, evidence_score=0.7).evidence_score == 0.7
    with pytest.raises(ConfigError):
        replace(PruneConfig(), suspicion_score=1, evidence_score=0.9)


@pytest.mark.parametrize("name", FIELDS)
def test_frozen(name: str) -> None:
    config = PruneConfig()
    with pytest.raises(FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(ConfigError):
        replace(config, **{name: -1})


def test_every_field_is_explained() -> None:
    texts = explanations()
    assert list(texts) == [field.name for field in fields(PruneConfig)]
    assert {name for name, text in texts.items() if len(text) < 20 or not text.rstrip().endswith(".")} == set()
    assert len(set(texts.values())) == len(texts)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        PruneConfig(learning_rate=1)  # type: ignore[call-arg]
