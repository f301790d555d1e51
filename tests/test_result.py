"""PruneResult on disk: what comes back is what was saved, and nothing half-written or foreign is accepted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import snapshot
from test_optimize import quadrants, small, taught
from test_prune import ALWAYS, NAMES
from torch import Tensor, nn

from mnp_fast import FileError, MnpFastError, PruneResult, prune, scan
from mnp_fast.io import read_weights


def loader() -> list[tuple[Tensor, Tensor]]:
    return [(quadrants().images, quadrants().labels)]


@pytest.fixture(scope="module")
def result() -> PruneResult:
    torch.manual_seed(0)
    found = prune(taught(small()), loader(), ALWAYS, triggered_loader=loader(), progress=False)
    assert any(found.pruned.values())
    return found


@pytest.fixture
def saved(result: PruneResult, tmp_path: Path) -> Path:
    result.save(tmp_path / "new" / "run")
    return tmp_path / "new" / "run"


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_round_trip(result: PruneResult, saved: Path) -> None:
    loaded = PruneResult.load(saved)
    assert loaded.model is None
    assert loaded.report() == result.report()
    assert loaded.pruned == result.pruned
    assert loaded.masks.keys() == result.masks.keys()
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in result.masks.items())
    assert {mask.dtype for mask in loaded.masks.values()} == {torch.float32}


def test_round_trip_of_the_model(result: PruneResult, saved: Path) -> None:
    fresh = small().train()
    before = snapshot(fresh)
    loaded = PruneResult.load(saved, fresh)
    assert snapshot(fresh) == before
    assert loaded.model is not None
    assert result.model is not None
    assert loaded.model is not fresh
    assert type(loaded.model) is type(result.model)
    assert not any(module.training for module in loaded.model.modules())
    images = quadrants(seed=5).images
    assert torch.equal(loaded.model(images), result.model(images))
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in result.model.state_dict().items())


def test_files(result: PruneResult, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "masks.safetensors",
        "model.safetensors",
        "report.html",
        "report.json",
    ]
    weights = read_weights(saved / "model.safetensors")
    assert result.model is not None
    assert weights.keys() == result.model.state_dict().keys()
    fresh = small()
    fresh.load_state_dict(weights)
    images = quadrants().images
    assert torch.equal(fresh.eval()(images), result.model(images))


def test_report(result: PruneResult, saved: Path) -> None:
    report = strict((saved / "report.json").read_text())
    assert type(report["schema_version"]) is int
    assert report["kind"] == "prune"
    assert report["verdict"] in ("evidence of a backdoor", "suspicious", "no evidence found")
    assert report["run"]["config"] == strict(json.dumps(ALWAYS.__dict__))
    assert report["run"]["seed"] == 0
    assert report["metrics"]["asr_before"] == result.metrics["asr_before"]
    assert [entry["stage"] for entry in report["history"]] == list(NAMES)
    del report["schema_version"]
    assert report == strict(json.dumps(result.report(), allow_nan=False))


def test_numbers_that_json_does_not_know_become_null(result: PruneResult, tmp_path: Path) -> None:
    history = [{"stage": "suppress", "loss": math.nan, "seconds": math.inf}]
    replace(result, history=history).save(tmp_path)
    assert strict((tmp_path / "report.json").read_text())["history"] == [
        {"stage": "suppress", "loss": None, "seconds": None}
    ]


def test_saving_again_replaces(result: PruneResult, saved: Path) -> None:
    replace(result, threshold=0.25).save(saved)
    assert PruneResult.load(saved).threshold == 0.25
    assert len(list(saved.iterdir())) == 4


def test_unwritable_directory(result: PruneResult, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("something else")
    for directory in (file, file / "run"):
        with pytest.raises(FileError, match="cannot be written to"):
            result.save(directory)
    assert file.read_text() == "something else"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_leaves_the_old_result(result: PruneResult, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnp_fast.io.save_file", full)
    with pytest.raises(FileError, match="No space left"):
        replace(result, threshold=0.25).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_loaded_result_without_a_model_is_not_saved(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="without a model"):
        PruneResult.load(saved).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_wrong_architecture(saved: Path) -> None:
    wider = small()
    wider[9] = nn.Linear(32, 5)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    for model, match in ((wider, "9.weight is .* in the file"), (other, "unknown")):
        before = snapshot(model)
        with pytest.raises(FileError, match=match):
            PruneResult.load(saved, model)
        assert snapshot(model) == before


def test_what_is_no_saved_result(saved: Path, tmp_path: Path) -> None:
    for directory in (tmp_path / "nothing", saved / "report.json", tmp_path):
        with pytest.raises(FileError, match="has no report"):
            PruneResult.load(directory)
    (saved / "masks.safetensors").unlink()
    with pytest.raises(FileError, match="masks"):
        PruneResult.load(saved)


def test_damaged_reports(saved: Path) -> None:
    text = (saved / "report.json").read_text()
    newer, lacking = json.loads(text), json.loads(text)
    newer["schema_version"] += 1
    del lacking["metrics"]
    cases = [
        (text[: len(text) // 2], "damaged"),
        (json.dumps(newer), "schema version"),
        (json.dumps(lacking), "lacks 'metrics'"),
        ("[]", "schema version"),
    ]
    for content, match in cases:
        (saved / "report.json").write_text(content)
        with pytest.raises(FileError, match=match):
            PruneResult.load(saved)


def test_truncated_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileError, match="truncated"):
        PruneResult.load(saved, small())


def test_the_report_of_a_scan_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = scan(taught(small()), loader(), ALWAYS, progress=False)
    found.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    report = strict((tmp_path / "report.json").read_text())
    assert report["kind"] == "scan"
    assert report["verdict"] == found.verdict
    with pytest.raises(FileError, match="the report of a scan") as caught:
        PruneResult.load(tmp_path)
    assert isinstance(caught.value, MnpFastError)


def test_a_scan_is_not_saved_beside_a_repaired_model(result: PruneResult, saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    found = scan(taught(small()), loader(), ALWAYS, progress=False)
    with pytest.raises(FileError, match="holds a repaired model"):
        found.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
