"""report.html: everything that matters stands in it, it loads nothing, and no name can break out of its cell."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor

from mnp_fast.config import PruneConfig
from mnp_fast.detect import EVIDENCE, NONE_FOUND, SUSPICIOUS, Evidence, Look
from mnp_fast.report import html
from mnp_fast.result import PruneResult, ScanResult

LOOK = Look(500, 10, 0.6, 0.2, 9.5, 3, 0.5, 8, 0.912, 8, 0.5, 0.125, 4, 0.25, True)
OTHER = replace(LOOK, pulled_class=3, perturbed_share=0.5, transferred_share=0.25, wave_contrast=0.0)
FOUND = Evidence((LOOK, LOOK, OTHER))
MASKS = {"layer.1": torch.tensor([0.0, 0.05, 0.3, 1.0]), "layer.2": torch.ones(3)}
RUN = {
    "mnp_fast": "0.1.0",
    "torch": "2.13.0",
    "model": "nets.Small",
    "seed": 7,
    "pictures": {"learning": 400, "held_back": 100},
    "config": asdict(PruneConfig()),
}
HISTORY = [
    {"stage": "suppress", "seconds": 3.25, "loss": 2.5, "accuracy": 0.19},
    {"stage": "search", "seconds": 12.0},
    {"stage": "masks", "seconds": 1.0, "loss": float("nan"), "accuracy": 0.5},
]


def scanned(found: Evidence = FOUND, verdict: str = EVIDENCE, target: int | None = 8) -> dict[str, Any]:
    return ScanResult(verdict, target, found.report(), HISTORY, RUN).report()


def pruned(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": None,
        "masks": MASKS,
        "pruned": {"layer.1": [0, 1], "layer.2": []},
        "threshold": 0.05,
        "verdict": EVIDENCE,
        "suspected_target": 8,
        "evidence": FOUND.report(),
        "metrics": {"clean_accuracy_before": 0.91, "clean_accuracy_after": 0.89, "held_back": 100},
        "history": HISTORY,
        "run": RUN | {"repair_strength": 1.0},
    }
    return PruneResult(**fields | changes).report()


class Cells(HTMLParser):
    """Rows of all tables, each a list of its cells' texts, and the tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, first: str) -> list[list[str]]:
        """The cells after the first of every row that begins with it."""
        found = [row for row in self.rows if re.fullmatch(re.escape(first) + r"\b.*|" + re.escape(first), row[0])]
        return [[cell.strip() for cell in row[1:]] for row in found]

    def row(self, first: str) -> list[str]:
        (found,) = self.all(first)
        return found


def test_what_was_found() -> None:
    page = html(scanned(), {})
    cells = Cells(page)
    assert cells.open == []
    assert "Evidence of a backdoor" in page
    assert "Suspected target: class 8." in page
    assert f"Score <strong>{FOUND.score:.3f}" in page
    assert [cells.row(f"class {one}")[0] for one in (8, 4, 3)] == ["0.767", "0.300", "0.167"]
    assert "Look 3 of 3" in page
    assert "No further look" not in page
    assert [row[:2] for row in cells.all("Pictures of other classes")] == [["8", "0.912"]] * 2 + [["3", "0.500"]]
    assert [row[:2] for row in cells.all("Lead of this class")] == [["8", "0.900"]] * 2 + [["8", "0.300"]]
    assert [row[:2] for row in cells.all("How much it depends")] == [["4", "0.450"]] * 2 + [["4", "0.000"]]
    assert cells.row("suppress")[:3] == ["3.2", "2.5", "0.19"]
    assert cells.row("search") == ["12.0", "-", "-"]
    assert cells.row("evidence_score") == ["0.75"]
    assert cells.row("seed") == ["7"]
    assert "never a certificate" in page
    assert "Repair" not in page


def test_what_was_repaired() -> None:
    page = html(pruned(), MASKS)
    cells = Cells(page)
    assert cells.open == []
    assert cells.row("clean accuracy after") == ["0.89"]
    assert cells.row("neurons pruned") == ["2 of 7"]
    assert cells.row("layer.1")[:2] == ["2", "4"]
    assert cells.row("0 to 0.1")[0] == "2"
    assert cells.row("0.3 to 0.4")[0] == "1"
    assert cells.row("0.9 to 1")[0] == "0"
    assert cells.row("masks") == ["1.0", "nan", "0.5"]
    assert "layer.2" not in page
    assert "ASR" not in page


def test_asr_where_it_was_measured() -> None:
    metrics = {"clean_accuracy_before": 0.9, "asr_before": 1.0, "asr_after": 0.0123456, "der": 0.98}
    page = html(pruned(metrics=metrics), MASKS)
    assert Cells(page).row("ASR after") == ["0.01235"]
    assert "which steered nothing" in page


def test_nothing_found_and_nothing_done() -> None:
    ones = {name: torch.ones_like(mask) for name, mask in MASKS.items()}
    nothing = pruned(verdict=NONE_FOUND, suspected_target=None, pruned={name: [] for name in ones}, masks=ones)
    page = html(nothing, ones)
    assert "No class is suspected." in page
    assert 'class="verdict none"' in page
    assert "Pruned neurons" not in page
    assert "<h2>Masks" not in page
    assert Cells(page).row("neurons pruned") == ["0 of 7"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (replace(LOOK, batch_norms=False), "Without BatchNorm"),
        (replace(LOOK, classes=4), "fewer than 5 classes"),
        (replace(LOOK, pictures=149), "fewer than 150 pictures"),
        (replace(LOOK, wave_class=None), "No further look"),
    ],
)
def test_limits_of_the_verdict(found: Look, said: str) -> None:
    page = html(scanned(Evidence((found,)), SUSPICIOUS, 8), {})
    assert 'class="verdict suspicious"' in page
    assert said in page
    assert said not in html(scanned(), {})


def test_names_cannot_break_out() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    masks: dict[str, Tensor] = {hostile: torch.zeros(2)}
    page = html(pruned(pruned={hostile: [0]}, masks=masks, run=RUN | {"model": hostile, "repair_strength": 1.0}), masks)
    assert "<script" not in page
    assert Cells(page).row(hostile)[:2] == ["1", "2"]


def test_nothing_is_loaded() -> None:
    page = html(pruned(), MASKS)
    names = {name for name, _ in Cells(page).attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style"}
    assert not re.search(r"https?:|url\(|@import", page)


def test_says_how_well_the_model_knew_the_pictures() -> None:
    told = pruned(run=RUN | {"repair_strength": 1.0, "accuracy": 0.8642})
    assert "500 clean pictures, of which the model came with 86.4 % right" in html(told, MASKS)
    assert "came with" not in html(pruned(), MASKS)
