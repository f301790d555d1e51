"""What the public calls give back, and how it is kept on disk."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnp_fast import io
from mnp_fast.errors import FileError
from mnp_fast.report import html

_PAGE = "report.html"
FILES = ("model.safetensors", "masks.safetensors", io.REPORT, _PAGE)
"""What a saved result is."""


@dataclass
class ScanResult:
    """Verdict and evidence of `mnp_fast.scan`.

    verdict: "evidence of a backdoor", "suspicious" or "no evidence found"; never a certificate. suspected_target: class
    index, or None. evidence: what the verdict rests on. history: per stage loss, accuracy, seconds, peak memory.
    """

    verdict: str
    suspected_target: int | None
    evidence: dict[str, Any]
    history: list[dict[str, Any]]
    run: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "kind": "scan",
            "verdict": self.verdict,
            "suspected_target": self.suspected_target,
            "evidence": self.evidence,
            "history": self.history,
            "run": self.run,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write report.json and report.html, both or none. FileError if that cannot be done, or where a repaired model
        stands there, which this report is not of."""
        check_no_model(directory)
        io.save_files(directory, tensors={}, report=self.report(), texts={_PAGE: html(self.report(), {})})


def check_no_model(directory: str | os.PathLike[str]) -> None:
    """FileError where a `PruneResult` was saved: the report of a scan would stand beside another run's model."""
    if all((Path(directory) / name).exists() for name in FILES):
        raise FileError(f"{directory} holds a repaired model and its report; name another directory for a scan")


@dataclass
class PruneResult:
    """A repaired model and how it came about.

    model: the repaired model in eval mode: same class, plain weights, no wrapper; None in a loaded result for which no
    model was given. masks: site name to (neurons,) float32 in [0, 1]. pruned: site name to the indices of the pruned
    neurons. threshold: t, neurons with masks up to t may be pruned; -1 where none was. verdict, suspected_target,
    evidence, history: as in `ScanResult`. metrics: accuracy on held-back clean pictures before and after, in [0, 1];
    asr_before, asr_after and der only where triggered pictures were given. run: as there, and repair_strength in
    [0, 1]: 1 where a class is suspected, 0 where the model stays as it came (docs/method.md).
    """

    model: nn.Module | None
    masks: dict[str, Tensor]
    pruned: dict[str, list[int]]
    threshold: float
    verdict: str
    suspected_target: int | None
    evidence: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    run: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """All but the weights and masks, as JSON values."""
        return {
            "kind": "prune",
            "verdict": self.verdict,
            "suspected_target": self.suspected_target,
            "evidence": self.evidence,
            "metrics": self.metrics,
            "threshold": self.threshold,
            "pruned": self.pruned,
            "history": self.history,
            "run": self.run,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors, masks.safetensors, report.json and report.html, all or none; else FileError."""
        if self.model is None:
            raise FileError("this result was loaded without a model; pass one to PruneResult.load to save it again")
        tensors = {"model": io.model_tensors(self.model), "masks": self.masks}
        io.save_files(directory, tensors=tensors, report=self.report(), texts={_PAGE: html(self.report(), self.masks)})

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module | None = None) -> PruneResult:
        """Read a saved result. model: a network of the same architecture; a copy of it gets the repaired weights.

        Weights are only read where a model is given, since a file of tensors does not say how to build one.
        FileError if the directory or the weights do not fit.
        """
        report = io.read_report(directory)
        if report.get("kind") != "prune":
            raise FileError(f"{directory} holds the report of a {report.get('kind')}; name one that `save` wrote")
        repaired = None
        if model is not None:
            repaired = copy.deepcopy(model).eval()
            io.fit_weights(repaired, io.read_weights(Path(directory) / "model.safetensors"))
        names = ("pruned", "threshold", "verdict", "suspected_target", "evidence", "metrics", "history", "run")
        try:
            fields = {name: report[name] for name in names}
        except KeyError as error:
            raise FileError(f"the report in {directory} lacks {error}; run again and save anew") from error
        return cls(model=repaired, masks=io.read_weights(Path(directory) / "masks.safetensors"), **fields)
