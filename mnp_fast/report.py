"""report.html: one page that a person can read without anything else, from what report.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from torch import Tensor

from mnp_fast.detect import FEWEST_CLASSES, FEWEST_PICTURES

_BINS = 10
_SIGNS = {
    "pull": "Pictures of other classes that the suppressed model puts into this class, once perturbed towards it",
    "transfer": "Lead of this class among small perturbations of the suppressed model that fool the model itself",
    "wave": "How much it depends on the place of a single wave whether the model puts other pictures into this class",
}


def html(report: Mapping[str, Any], masks: Mapping[str, Tensor]) -> str:
    """The page, in UTF-8, nothing loaded from elsewhere. report: `PruneResult.report` or `ScanResult.report`.

    masks: site name to (neurons,) in [0, 1]; empty for a scan.
    """
    environment = Environment(
        loader=PackageLoader("mnp_fast", ""),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pruned = {site: len(neurons) for site, neurons in report.get("pruned", {}).items() if neurons}
    return environment.get_template("report.html").render(
        report=report,
        signs=_SIGNS,
        sites=[(site, count, len(masks[site])) for site, count in pruned.items()],
        neurons=sum(map(len, masks.values())),
        histogram=_histogram(masks),
        fewest_classes=FEWEST_CLASSES,
        fewest_pictures=FEWEST_PICTURES,
    )


def _histogram(masks: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """(range of masks, neurons), ten ranges of one width; those at 1, which nothing pressed down, are left out."""
    if not masks:
        return []
    every = torch.cat([mask.flatten() for mask in masks.values()]).double()
    counts = torch.histc(every[every < 1], _BINS, 0.0, 1.0).int().tolist()
    return [(f"{low / _BINS:g} to {(low + 1) / _BINS:g}", count) for low, count in enumerate(counts)]
