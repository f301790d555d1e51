"""Files: no pickle runs, damaged files are named, and results are written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mnp_fast import io
from mnp_fast.errors import FileError


def net(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, outputs))


def state(outputs: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: value.clone() for name, value in net(outputs).state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "net"])
def test_pickled_state_dicts_are_read(tmp_path: Path, suffix: str, wrap: str | None) -> None:
    file = tmp_path / f"w{suffix}"
    torch.save({wrap: state(), "epoch": 3} if wrap else state(), file)
    assert equal(io.read_weights(file), state())


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    assert equal(io.read_weights(str(tmp_path / "w.safetensors")), state())


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_hostile_pickle_is_refused_and_never_runs(tmp_path: Path, form: str) -> None:
    file, marker = tmp_path / "w.pth", tmp_path / "marker"
    content = {"state_dict": state(), "extra": Hostile(marker)}
    if form == "bare":
        file.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FileError, match=r"holds Python code or objects .*is not opened; get a file of tensors only"):
        io.read_weights(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content["extra"]))
    assert marker.exists(), "the pickle would not have run anywhere, so the test showed nothing"


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pth")
    with pytest.raises(FileError, match=r"Python code or objects \(torch\.nn\.modules\.container\.Sequential\)"):
        io.read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("kept", [0, 4, 100, -40])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, kept: int) -> None:
    whole, file = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    torch.save(state(), whole) if suffix == ".pth" else save_file(state(), whole)
    file.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(FileError, match=rf"cut{suffix} is truncated.*fetch it again"):
        io.read_weights(file)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ([1, 2], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"weight": torch.ones(2), "epoch": 3}, r"not a state dict: it holds 'epoch' \(int\)"),
        ({1: torch.ones(2)}, "names that are not text"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, cause: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(FileError, match=cause):
        io.read_weights(tmp_path / "w.pth")


def test_paths_that_are_no_weights_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"x")
    for path, cause in ((tmp_path, "is a directory"), (tmp_path / "no.pth", "does not exist"), ("w.h5", "not exist")):
        with pytest.raises(FileError, match=cause):
            io.read_weights(path)
    with pytest.raises(FileError, match=r"ends in \.h5; weights are read from \.safetensors, \.pth"):
        io.read_weights(tmp_path / "w.h5")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_weights_fit_with_or_without_a_common_prefix(prefix: str) -> None:
    model = net()
    io.fit_weights(model, {prefix + name: value for name, value in state().items()})
    assert equal(dict(model.state_dict()), state())


def test_a_model_with_the_prefix_keeps_it() -> None:
    model = nn.ModuleDict({"module": net()})
    io.fit_weights(model, {f"module.{name}": value for name, value in state().items()})
    assert equal(dict(model["module"].state_dict()), state())


def test_files_without_batch_counters_fit() -> None:
    model = net()
    io.fit_weights(model, {name: value for name, value in state().items() if "num_batches" not in name})
    assert torch.equal(model[3].weight, state()["3.weight"])


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        (without("0.bias"), r"1 missing \(0\.bias\)"),
        (state() | {"head.weight": torch.ones(2)}, r"1 unknown \(head\.weight\)"),
        (state(7), r"2 of another shape \(3\.weight is \(7, 5\) in the file, \(4, 5\) in the model, 3\.bias"),
        ({"a": torch.ones(1)}, r"8 missing \(0\.weight, 0\.bias, 1\.weight, \.\.\.\); 1 unknown \(a\)"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_unchanged(weights: dict[str, Tensor], cause: str) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError, match=cause):
        io.fit_weights(model, weights)
    assert equal(dict(model.state_dict()), before)


def test_a_model_that_refuses_its_weights_halfway_is_put_back() -> None:
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            raise RuntimeError("not these")

    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileError, match=r"refused the weights .*not these"):
        io.fit_weights(model, {name: value + 1 for name, value in before.items()})
    assert equal(dict(model.state_dict()), before)


REPORT = {"verdict": "suspicious", "metrics": {"accuracy": 0.5, "asr": float("nan"), "sites": (1, 2)}}


def test_results_are_written_and_read(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tied = {"a": weight, "b": weight, "c": weight.t(), "d": weight[:1].expand(3, 4), "e": weight[1:]}
    out = tmp_path / "deep" / "out"
    io.save_files(out, tensors={"model": tied, "masks": {"m": weight[0]}}, report=REPORT, texts={"report.html": "<p>"})
    assert sorted(os.listdir(out)) == ["masks.safetensors", "model.safetensors", "report.html", "report.json"]
    assert equal(io.read_weights(out / "model.safetensors"), tied)
    assert "NaN" not in (out / "report.json").read_text()
    report = io.read_report(out)
    assert report["schema_version"] == io.SCHEMA_VERSION
    assert report["metrics"] == {"accuracy": 0.5, "asr": None, "sites": [1, 2]}
    assert (out / "model.safetensors").stat().st_mode == (out / "report.json").stat().st_mode


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["tensors", "json", "flush", "rename first", "rename last", "interrupt"])
def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        io.save_files(out, tensors={"model": state()}, report=REPORT)
    before = snapshot(tmp_path)
    report: dict[str, Any] = {"verdict": "new"}
    error: type[BaseException] = FileError
    if step == "json":
        report["object"], error = object(), TypeError
    elif step in ("tensors", "flush"):

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(io, "save_file" if step == "tensors" else "_flush", full)
    else:
        real, failing = os.replace, {"rename first": "model.safetensors"}.get(step, "report.json")

        def replace(source: Path, target: Path) -> None:
            if target == out / failing and not source.name.startswith("old-"):
                raise KeyboardInterrupt if step == "interrupt" else OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        error = KeyboardInterrupt if step == "interrupt" else FileError
    with pytest.raises(error):
        io.save_files(out, tensors={"model": {"w": torch.ones(3)}, "masks": {"m": torch.ones(1)}}, report=report)
    assert snapshot(tmp_path) == before


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    io.save_files(tmp_path, tensors={"model": state()}, report=REPORT)
    io.save_files(tmp_path, tensors={"model": {"w": torch.ones(3)}}, report={"verdict": "new"})
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "report.json"]
    assert io.read_report(tmp_path)["verdict"] == "new"
    assert list(io.read_weights(tmp_path / "model.safetensors")) == ["w"]


def test_unwritable_directories_are_named_before_and_when_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(FileError, match=r"cannot be written to .*name a directory"):
            io.check_writable(folder)
        with pytest.raises(FileError, match="cannot be written to"):
            io.save_files(folder, tensors={"model": state()}, report=REPORT)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(FileError, match="Permission denied"):
        io.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    io.check_writable(tmp_path / "a" / "b")
    io.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "is damaged: not strict JSON"),
        ('{"schema_version": 3, "x": NaN}', "the constant NaN"),
        ('{"schema_version": 99}', "has schema version 99, this mnp_fast reads 3"),
        ("[1]", "has schema version None"),
        (b"\xff\xfe", "is damaged"),
    ],
)
def test_damaged_reports_are_named(tmp_path: Path, text: str | bytes, cause: str) -> None:
    (tmp_path / "report.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=cause):
        io.read_report(tmp_path)


def test_a_directory_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"has no report\.json"):
        io.read_report(tmp_path / "nowhere")


def test_json_is_strict() -> None:
    value = {"a": (torch.tensor(1.5), float("inf")), "p": Path("x"), 3: True, "n": None}
    assert json.loads(io.to_json(value)) == {"a": [1.5, None], "p": "x", "3": True, "n": None}


def test_one_run_after_the_other_puts_its_files_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    asked, lock = threading.Event(), fcntl.flock

    def noted(*args: Any) -> None:
        asked.set()
        lock(*args)

    monkeypatch.setattr(io.fcntl, "flock", noted)
    save = threading.Thread(target=io.save_files, args=(tmp_path,), kwargs={"tensors": {}, "report": {"a": 1}})
    save.start()
    assert asked.wait(60)
    save.join(0.3)
    waited = save.is_alive() and not (tmp_path / "report.json").exists()
    os.close(handle)
    save.join(10)
    assert waited
    assert io.read_report(tmp_path)["a"] == 1
