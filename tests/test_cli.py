"""The command: what it reads, what it says, and its exit codes; and the networks and pictures that it makes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import mnp_fast
from mnp_fast import architectures, cli, detect, io
from mnp_fast.architectures import Preprocessing, build, build_with_weights, preprocessing
from mnp_fast.data import check_model, collect
from mnp_fast.errors import ConfigError, DataError, FileError, ModelError
from mnp_fast.pictures import read_pictures
from mnp_fast.result import FILES

FACTORY = """
from torch import nn
print("printed by the factory")
not_callable = 3
def fixed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
def sized(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, num_classes))
def no_network():
    return [1]
def fails():
    raise KeyError("lost")
"""
COLOURS = {"blue": (20, 30, 220), "green": (20, 210, 40), "red": (230, 20, 30)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of factories, weights, clean pictures as folder and as .npz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_test", raising=False)
    (tmp_path / "nets_of_test.py").write_text(FACTORY)
    torch.manual_seed(0)
    save_file(build("nets_of_test:fixed").state_dict(), tmp_path / "w.safetensors")
    save_file(build("nets_of_test:sized", 3).state_dict(), tmp_path / "sized.safetensors")
    rng = np.random.default_rng(0)
    images, labels = [], []
    for label, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            array = np.clip(rng.normal(colour, 25, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(array).save(tmp_path / "data" / name / f"{i}.png")
            images.append(array)
            labels.append(label)
    np.savez(tmp_path / "data.npz", x=np.stack(images), y=np.array(labels))
    return tmp_path


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    budget: float = 0.02
    seeds: int = 1
    name: str = "a"

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ConfigError(f"budget is {self.budget}; it must be at least 0")


@dataclasses.dataclass
class FakeResult:
    verdict: str = "no evidence found"
    suspected_target: int | None = None
    pruned: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    masks: dict[str, Tensor] = dataclasses.field(default_factory=lambda: {"1": torch.ones(8)})
    metrics: dict[str, Any] = dataclasses.field(default_factory=lambda: {"clean_accuracy_before": 0.912, "asr": None})
    run: dict[str, Any] = dataclasses.field(default_factory=lambda: {"repair_strength": 0.429, "accuracy": 0.8642})
    evidence: dict[str, Any] = dataclasses.field(default_factory=lambda: {"score": 0.1234, "looks": [{}]})
    history: list[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: [{"stage": "suppress", "loss": 2.5, "accuracy": 0.19, "seconds": 3.25, "peak_mb": 1.0}]
    )

    def report(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "metrics": self.metrics, "loss": float("nan")}

    def save(self, directory: Path) -> None:
        io.save_files(directory, tensors={"masks": self.masks}, report=self.report())


class Core:
    """Stands in for the package's own calls: checks the input as they do, and keeps what it was given."""

    def __init__(self) -> None:
        self.result: FakeResult | BaseException = FakeResult()
        self.given: dict[str, Any] = {}

    def prune(self, model: nn.Module, loader: Any, config: Any = None, **options: Any) -> FakeResult:
        data = collect(loader)
        check_model(model, data)
        print("printed by a library")
        self.given = {"model": model, "data": data, "config": config, **options}
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    fake = Core()
    monkeypatch.setattr(mnp_fast, "prune", fake.prune, raising=False)
    monkeypatch.setattr(mnp_fast, "scan", fake.prune, raising=False)
    monkeypatch.setattr(mnp_fast, "PruneConfig", FakeConfig, raising=False)
    return fake


BASE = {"--arch": "nets_of_test:fixed", "--weights": "w.safetensors", "--data": "data", "--device": "cpu"}


def words(command: str = "prune", *extra: str, **changes: str) -> list[str]:
    options = BASE | ({"--out": "out"} if command == "prune" else {})
    options |= {f"--{name}": value for name, value in changes.items()}
    return [command, *(word for pair in options.items() for word in pair), *extra]


EVIDENT = detect.EVIDENCE
CODES = [
    ("prune", FakeResult(), 0),
    ("prune", FakeResult("suspicious", 1), 4),
    ("prune", FakeResult("suspicious", 1, {"1": [2]}), 0),
    ("prune", FakeResult(EVIDENT, 1, {"1": [2, 5], "4": []}), 0),
    ("prune", FakeResult(EVIDENT, 1, {"1": []}), 3),
    ("scan", FakeResult("suspicious", 1), 4),
    ("scan", FakeResult(), 0),
    ("scan", FakeResult(EVIDENT, 1), 3),
    ("prune", KeyboardInterrupt(), 130),
    ("scan", ModelError("the model has no prunable site; give another"), 2),
]


@pytest.mark.parametrize(("command", "result", "code"), CODES)
def test_exit_codes(here: Path, core: Core, command: str, result: Any, code: int) -> None:
    core.result = result
    assert cli.main(words(command)) == code
    assert (here / "out" / "report.json").exists() == (command == "prune" and isinstance(result, FakeResult))


@pytest.mark.parametrize(("given", "said"), [([], "nothing was written"), (["--checkpoint", "kept"], "from kept")])
def test_an_interrupt_says_what_is_left(
    here: Path, core: Core, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    core.result = KeyboardInterrupt()
    assert cli.main(words("prune", *given)) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
    assert core.given["checkpoint"] == (Path("kept") if given else None)


def test_scan_writes_where_it_is_told_to(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("scan", "--out", "found")) == 0
    assert (here / "found" / "report.json").exists()
    assert "written to found" in capsys.readouterr().out
    (here / "file").touch()
    core.given = {}
    assert cli.main(words("scan", "--out", "file")) == 2
    assert core.given == {}  # said before the long work


def test_errors_are_one_line_on_standard_error(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    core.result = ModelError("the model has no prunable site; give another")
    assert cli.main(words()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "mnp-fast: error: the model has no prunable site; give another"


def test_the_table_tells_the_result(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    core.result = FakeResult(EVIDENT, 1, {"layer.1": [2, 5], "layer.4": []}, {"layer.1": torch.ones(8)})
    core.result.evidence = {"score": 0.8765, "looks": [{}, {}, {}]}
    cli.main(words())
    out = capsys.readouterr().out
    for text in (
        EVIDENT,
        "0.88 (3 looks)",
        "1 (green)",
        "0.912",
        "0.8642",
        "0.43",
        "2 of 8",
        "layer.1",
        "suppress",
        "3.25",
        "written to out",
    ):
        assert text in out
    assert "layer.4" not in out


def test_json_is_one_strict_object_alone(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("scan", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "no evidence found"
    assert json.loads(out)["loss"] is None
    assert json.loads(out)["schema_version"] == io.SCHEMA_VERSION
    assert "printed by a library" in err


def test_quiet_prints_nothing(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words("prune", "--quiet"))
    assert capsys.readouterr().out == ""
    assert core.given["progress"] is False


def test_options_reach_the_call(here: Path, core: Core) -> None:
    options = [
        "--config",
        "budget=0.08",
        "--config",
        "name=b",
        "--seed",
        "7",
        "--limit",
        "30",
        "--mean",
        "0.5",
        "--std",
    ]
    assert cli.main(words("prune", *options, "0.25", "0.5", "1")) == 0
    assert core.given["config"] == FakeConfig(0.08, 1, "b")
    assert core.given["seed"] == 7
    assert core.given["device"] == torch.device("cpu")
    assert core.given["triggered_loader"] is None
    assert torch.bincount(core.given["data"].labels).tolist() == [10, 10, 10]
    pixel = (np.asarray(Image.open(here / "data" / "blue" / "0.png"), np.float32)[0, 0] / 255 - 0.5) / (0.25, 0.5, 1)
    full = read_pictures(here / "data", Preprocessing(None, (0.5,), (0.25, 0.5, 1.0)))
    assert np.allclose(next(iter(full))[0][0, :, 0, 0], pixel)
    weights = io.read_weights(here / "w.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in core.given["model"].state_dict().items())


@pytest.mark.parametrize(("target", "labels"), [([], [20, 20, 20]), (["--target", "1"], [0, 40])])
def test_triggered_pictures(here: Path, core: Core, target: list[str], labels: list[int]) -> None:
    assert cli.main(words("prune", *target, triggered="data.npz")) == 0
    assert torch.bincount(collect(core.given["triggered_loader"], min_classes=1).labels).tolist() == labels


def test_the_number_of_classes_is_read_off_the_weights(here: Path, core: Core) -> None:
    assert cli.main(words("scan", arch="nets_of_test:sized", weights="sized.safetensors")) == 0
    assert core.given["model"][3].out_features == 3


def make_bad(here: Path) -> None:
    (here / "text.safetensors").write_text("hello")
    (here / "notes.txt").write_text("hello")
    (here / "cut.npz").write_bytes((here / "data.npz").read_bytes()[:2000])
    (here / "none").mkdir()
    (here / "hollow" / "a").mkdir(parents=True)
    (here / "two" / "a").mkdir(parents=True)
    (here / "two" / "b").mkdir()
    for name in "ab":
        (here / "two" / name / "1.png").write_bytes((here / "data" / "red" / "1.png").read_bytes())
    (here / "damaged" / "a").mkdir(parents=True)
    (here / "damaged" / "a" / "1.jpg").write_text("no picture")
    x, y = np.zeros((30, 4, 4, 3), np.uint8), np.arange(30) % 3
    np.savez(here / "objects.npz", x=x, y=np.array([{}] * 30, dtype=object))
    np.savez(here / "names.npz", a=x, y=y)
    np.savez(here / "floats.npz", x=x, y=y / 2)
    np.savez(here / "counts.npz", x=x, y=y[:29])
    np.savez(here / "shape.npz", x=np.zeros((30, 4, 4, 4, 4), np.uint8), y=y)
    np.savez(here / "kind.npz", x=x.astype(np.int32), y=y)
    np.savez(here / "float_images.npz", x=np.zeros((30, 3, 4, 4), np.float32), y=y)
    np.savez(here / "labels.npz", x=x, y=y + 3)
    np.savez(here / "nan.npz", x=np.full((30, 3, 4, 4), np.nan, np.float32), y=y)


BAD = [
    ({"weights": "no.pth"}, [], "no.pth does not exist"),
    ({"weights": "text.safetensors"}, [], "truncated or no safetensors"),
    ({"weights": "sized.safetensors"}, [], "the weights do not fit the model"),
    ({"data": "no"}, [], "no does not exist; give a folder"),
    ({"data": "notes.txt"}, [], "neither a folder nor an .npz"),
    ({"data": "none"}, [], "has no subfolders"),
    ({"data": "hollow"}, [], "hold no pictures"),
    ({"data": "two"}, [], "has 2 subfolders, but the model has 3 classes"),
    ({"data": "damaged"}, [], "1.jpg cannot be read as a picture"),
    ({"data": "cut.npz"}, [], "truncated, or no .npz"),
    ({"data": "objects.npz"}, [], "no .npz file of plain arrays"),
    ({"data": "names.npz"}, [], "has no array x or images, only a, y"),
    ({"data": "floats.npz"}, [], "labels of floats.npz are float64"),
    ({"data": "counts.npz"}, [], "30 pictures but 29 labels"),
    ({"data": "shape.npz"}, [], "give (n, h, w, c) with 1 or 3 channels"),
    ({"data": "kind.npz"}, [], "give 8-bit (n, h, w, c) or floating"),
    ({"data": "float_images.npz", "size": "8"}, [], "only 8-bit ones can be resized"),
    ({"data": "labels.npz"}, [], "labels go up to 5, but the model has 3 classes"),
    ({"data": "nan.npz"}, [], "NaN or Inf"),
    ({"arch": "nets_of_test"}, [], "is in no known form"),
    ({"arch": "hub/resnet"}, [], "is in no known form"),
    ({"arch": "nets_of_test:fixt"}, [], "has no 'fixt'; did you mean fixed?"),
    ({"arch": "nowhere_of_test:net"}, [], "cannot be imported"),
    ({"arch": "nets_of_test:not_callable"}, [], "not a function"),
    ({"arch": "nets_of_test:no_network"}, [], "made a list; it must return a torch.nn.Module"),
    ({"arch": "nets_of_test:fails"}, [], "failed (KeyError: 'lost')"),
    ({"arch": ":fixed"}, [], "cannot be imported"),
    ({"arch": ".nets_of_test:fixed"}, [], "cannot be imported"),
    ({"classes": "5"}, [], "cannot be called as fixed(num_classes=5)"),
    ({"classes": "1"}, [], "needs at least 2"),
    ({"out": "w.safetensors"}, [], "cannot be written to"),
    ({"device": "gpu7"}, [], "device 'gpu7' cannot be used"),
    ({"size": "0"}, [], "size of pictures is 0"),
    ({"std": "0"}, [], "standard deviations"),
    ({"limit": "0"}, [], "limit of pictures is 0"),
    ({"batch-size": "0"}, [], "batch size is 0"),
    ({"target": "1"}, [], "give --triggered too"),
    ({"config": "budget"}, [], "has no value"),
    ({"config": "budgit=1"}, [], "unknown; did you mean budget?"),
    ({"config": "zz=1"}, [], "the names are budget, name, seeds"),
    ({"config": "budget=-1"}, [], "it must be at least 0"),
    ({"config": "budget=many"}, [], "cannot be used"),
    ({}, ["--mean", "0.1", "0.2"], "--mean has 2 values, but the pictures 3 channels"),
    ({}, ["--seed", "x"], "invalid int value"),
    ({}, ["--nope"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("changes", "extra", "cause"), BAD)
def test_bad_input_is_exit_code_2_with_its_cause(
    here: Path, core: Core, capsys: pytest.CaptureFixture[str], changes: dict[str, str], extra: list[str], cause: str
) -> None:
    make_bad(here)
    assert cli.main(words("prune", *extra, **changes)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert cause in err.splitlines()[-1]
    assert not (here / "out").exists()


@pytest.mark.parametrize("argv", [[], ["repair"], ["prune"]])
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "usage: mnp-fast" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prune", "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out


def python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(mnp_fast.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    call = [sys.executable, "-c", code, *argv]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("import sys; from mnp_fast.cli import main; sys.exit(main())", *argv, cwd=cwd)


def test_networks_are_made_in_a_fresh_process_whatever_torch_torchvision_was_built_for(tmp_path: Path) -> None:
    code = "from mnp_fast.architectures import build; build('torchvision/squeezenet1_1', 3); build('timm/test_vit', 3)"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_process_itself_ends_with_the_code_and_no_traceback(here: Path) -> None:
    done = command(*words("prune", weights="no.pth"), cwd=here)
    assert done.returncode == 2
    assert done.stderr.strip() == "mnp-fast: error: no.pth does not exist; check the path of the weights"


def test_a_real_run_from_end_to_end(here: Path) -> None:
    torch.manual_seed(1)
    model = build("nets_of_test:fixed")
    data = collect(read_pictures(here / "data", Preprocessing()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images), data.labels).backward()
        optimizer.step()
    save_file(model.state_dict(), here / "w.safetensors")
    looked = command(*words("scan", "--json", "--checkpoint", "stages"), cwd=here)
    seen = json.loads(looked.stdout)
    # Three classes and sixty pictures are too few for evidence.
    assert looked.returncode == {"no evidence found": 0, "suspicious": 4}[seen["verdict"]], looked.stderr
    settings = ("--config", "accuracy_limit=0.05", "--config", "finetune_epochs=2")
    done = command(*words("prune", "--json", "--checkpoint", "stages", *settings), cwd=here)
    assert done.returncode in (0, 4), done.stderr
    report = json.loads(done.stdout)
    repaired = any(report["pruned"].values())
    assert done.returncode == (0 if repaired else looked.returncode), done.stderr
    assert report["verdict"] == seen["verdict"]
    assert report["evidence"] == seen["evidence"]
    assert report["run"]["config"]["accuracy_limit"] == 0.05
    assert "suppress" in looked.stderr
    assert "suppress" not in done.stderr  # which went on from the evidence
    assert "masks" in done.stderr
    assert report == io.read_report(here / "out")
    repaired = build_with_weights("nets_of_test:fixed", io.read_weights(here / "out" / "model.safetensors"))
    accuracy = (repaired.eval()(data.images).argmax(1) == data.labels).float().mean()
    assert accuracy > 0.8


def test_torchvision_and_timm_networks_are_made_without_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    net = build("torchvision/resnet18", 7)
    assert net.fc.out_features == 7
    usual = preprocessing("torchvision/resnet18", net)
    assert usual == Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256 / 224)
    assert preprocessing("torchvision/efficientnet_b0", net).cubic
    # As torchvision makes them with its own weights, which nobody asks for here.
    assert build("torchvision/googlenet", 5).transform_input
    net = build("timm/test_vit.r160_in1k", 5)
    assert net.num_classes == 5
    usual = preprocessing("timm/test_vit.r160_in1k", build("timm/test_vit.r160_in1k"))
    assert (usual.size, usual.margin, usual.cubic) == (160, 1 / 0.95, True)
    weights = build("torchvision/mobilenet_v3_small", 9).state_dict()
    assert build_with_weights("torchvision/mobilenet_v3_small", weights).classifier[3].out_features == 9
    with pytest.raises(FileError, match="do not fit"):
        build_with_weights("torchvision/resnet18", weights)


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("torchvision/resnet19", "did you mean .*resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "is unknown"),
        ("timm/resnet19", "did you mean .*resnet1"),
        ("timm/hf_hub:someone/net", "is unknown"),
    ],
)
def test_unknown_networks_come_with_a_suggestion(spec: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        build(spec)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(architectures.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install torchvision"):
        build("torchvision/resnet18")
    with pytest.raises(ConfigError, match="pip install timm torchvision"):
        build("timm/resnet18")


def test_folders_are_resized_and_cropped_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep").mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "b" / "wide.png")
    Image.fromarray(wide[:, :, 0]).resize((5, 9)).save(tmp_path / "a" / "deep" / "grey.JPG", "JPEG")
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    pictures = read_pictures(tmp_path, Preprocessing(size=10))
    ((images, labels),) = pictures
    assert images.shape == (2, 3, 10, 10)
    assert labels.tolist() == [0, 1]
    assert bool((images[1] == 1).all())
    with pytest.raises(DataError, match="differ in shape"):
        next(iter(read_pictures(tmp_path, Preprocessing())))


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "grey", "float"])
def test_layouts_of_npz(tmp_path: Path, layout: str) -> None:
    array = np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), np.uint8)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    given = {
        "nhwc": array,
        "nchw": array.transpose(0, 3, 1, 2),
        "grey": array[..., 0],
        "float": expected.double().numpy(),
    }[layout]
    np.savez(tmp_path / "d.npz", images=given, labels=np.arange(6, dtype=np.uint8))
    batches = list(read_pictures(tmp_path / "d.npz", Preprocessing(mean=(0.5,)), batch_size=4))
    assert [len(y) for _, y in batches] == [4, 2]
    images = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(images.float(), (expected[:, :1] if layout == "grey" else expected) - 0.5)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(6))


def test_limits_are_shared_among_classes_and_follow_the_seed(here: Path) -> None:
    whole = read_pictures(here / "data", Preprocessing())
    some = whole.limited(7, seed=1)
    assert sorted(np.bincount(some.labels).tolist()) == [2, 2, 3]
    assert some.index == whole.limited(7, seed=1).index
    assert some.index != whole.limited(7, seed=2).index
    assert len(whole.limited(1000, seed=1)) == 60


def test_an_input_is_not_written_over(here: Path, core: Core, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own").mkdir()
    weights = here / "own" / "model.safetensors"
    weights.write_bytes((here / "w.safetensors").read_bytes())
    assert cli.main(words("prune", weights="own/model.safetensors", out=str(here / "own"))) == 2
    assert "would write over model.safetensors, which is an input" in capsys.readouterr().err
    assert weights.read_bytes() == (here / "w.safetensors").read_bytes()
    assert core.given == {}


def test_a_scan_is_not_written_beside_a_repaired_model(
    here: Path, core: Core, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        (here / name).touch()
    assert cli.main(words("scan", "--out", str(here))) == 2
    assert "holds a repaired model" in capsys.readouterr().err
    assert core.given == {}
    (here / "masks.safetensors").unlink()
    assert cli.main(words("scan", "--out", str(here))) == 0


def test_names_of_classes_may_be_anything(here: Path, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "data" / "green").rename(here / "data" / "grün [bold]")
    core.result = FakeResult(EVIDENT, 1)
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(words("scan")) == 3
    out.flush()
    assert rb"1 (gr\xfcn [bold])" in out.buffer.getvalue()  # type: ignore[attr-defined]
    assert core.result.run["class_names"] == ["blue", "grün [bold]", "red"]


@pytest.mark.parametrize("floating", [False, True])
def test_the_usual_preprocessing_is_for_pictures_of_8_bits(
    here: Path, core: Core, monkeypatch: pytest.MonkeyPatch, floating: bool
) -> None:
    """Folders and 8-bit arrays alike; floating arrays may have had it."""
    with np.load(here / "data.npz") as archive:
        images, labels = archive["x"], archive["y"]
    plain = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    if floating:
        np.savez(here / "data.npz", x=plain.numpy(), y=labels)
    monkeypatch.setattr(architectures, "preprocessing", lambda *_: Preprocessing(None, (0.5,), (0.25,)))
    assert cli.main(words("scan", data="data.npz")) == 0
    torch.testing.assert_close(core.given["data"].images, plain if floating else (plain - 0.5) / 0.25)
    assert cli.main(words("scan", "--mean", "0.1", data="data.npz")) == 0
    torch.testing.assert_close(core.given["data"].images, plain - 0.1 if floating else (plain - 0.1) / 0.25)


def test_a_network_takes_the_middle_of_a_larger_picture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a" / "1.png")
    for cubic, way in ((False, Image.Resampling.BILINEAR), (True, Image.Resampling.BICUBIC)):
        ((images, _),) = read_pictures(tmp_path, Preprocessing(18, margin=1 / 0.9, cubic=cubic))
        expected = np.asarray(Image.fromarray(array).resize((30, 20), way).crop((6, 1, 24, 19)))
        assert np.array_equal((images[0] * 255).round().numpy(), expected.transpose(2, 0, 1))
    ((images, _),) = read_pictures(tmp_path, Preprocessing(40, margin=1.5))
    assert images.shape == (1, 3, 40, 40)


def test_pictures_of_16_bits_keep_their_greys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a" / "1.png")
    Image.fromarray(ramp).save(tmp_path / "a" / "2.tiff")
    ((images, _),) = read_pictures(tmp_path, Preprocessing())
    assert torch.equal((images * 255).round(), torch.arange(256.0).view(1, 1, 16, 16).expand(2, 3, 16, 16))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "a" / "3.tiff")
    with pytest.raises(DataError, match=r"3.tiff has numbers of 32 bits .* give pictures of 8 or 16 bits"):
        list(read_pictures(tmp_path, Preprocessing()))


@pytest.mark.parametrize(
    ("module", "argv", "code"), [("mnp_fast.cli", ["scan"], 2), ("mnp_fast", ["scan"], 2), ("mnp_fast.cli", ["-h"], 0)]
)
def test_modules_run_as_programs_never_pass_a_model_by(module: str, argv: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr if code else done.stdout
