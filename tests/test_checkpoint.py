"""Checkpoints: an interrupted run goes on where it was, bit for bit; what is of another run, or damaged, is refused."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import snapshot
from test_optimize import small, taught
from test_prune import ALWAYS, LOOKS, NAMES, REPAIR, SHORT, Batches, equal, loader, run, run_module, same, state
from torch import nn

import mnp_fast
from mnp_fast import ConfigError, FileError, PruneConfig, PruneResult, checkpoint
from mnp_fast.checkpoint import Checkpoint, StageState, fingerprint, restore_
from mnp_fast.config import BEYOND_LOOKS
from mnp_fast.data import DefenceSet
from mnp_fast.io import model_tensors
from mnp_fast.waves import Wave

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return taught(small())


@pytest.fixture(scope="module")
def usual(model: nn.Module) -> PruneResult:
    return run(model)


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that ended."""
    folder = tmp_path_factory.mktemp("whole") / "made" / "on the way"
    run(model, checkpoint=folder)
    return folder


def up_to(whole: Path, count: int, folder: Path) -> Path:
    """As it was when ``count`` stages had ended."""
    folder.mkdir(exist_ok=True)
    for name in NAMES[:count]:
        shutil.copy(whole / f"stage-{name}.safetensors", folder)
    return folder


def stages(result: Any) -> list[str]:
    return [entry["stage"] for entry in result.history]


# ---------------------------------------------------------------- going on
def test_a_checkpoint_changes_nothing(model: nn.Module, usual: PruneResult, tmp_path: Path) -> None:
    result = run(model, checkpoint=tmp_path)
    assert same(result, usual)
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(f"stage-{name}" for name in NAMES)


@pytest.mark.parametrize("count", range(len(NAMES) + 1))
def test_goes_on_after_each_stage(
    model: nn.Module, usual: PruneResult, whole: Path, tmp_path: Path, count: int
) -> None:
    before = snapshot(model)
    result = run(model, checkpoint=up_to(whole, count, tmp_path))
    assert same(result, usual)
    assert stages(result) == list(NAMES)
    assert result.history[:count] == run(model, checkpoint=whole).history[:count]
    assert snapshot(model) == before


def test_a_run_that_ended_computes_no_stage_again(
    model: nn.Module, usual: PruneResult, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("suppress_", "recalibrate_", "find_wave", "perturb", "learn_masks", "select", "finetune_"):
        monkeypatch.setattr(run_module, name, None)
    assert same(run(model, checkpoint=whole), usual)


def test_goes_on_after_an_interrupt_anywhere(
    model: nn.Module, usual: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    run(model)
    total = batches.calls
    for number in range(5, total, 41):
        folder = tmp_path / str(number)
        batches.calls, batches.last = 0, number
        with pytest.raises(KeyboardInterrupt):
            run(model, checkpoint=folder)
        left = {file.name for file in folder.glob("*")}
        assert left <= {f"stage-{name}.safetensors" for name in NAMES}  # nothing half written
        batches.last = 0
        assert same(run(model, checkpoint=folder), usual)


def test_prune_goes_on_from_scan(model: nn.Module, usual: PruneResult, tmp_path: Path) -> None:
    found = mnp_fast.scan(model, loader(), ALWAYS, progress=False, checkpoint=tmp_path)
    result = run(model, checkpoint=tmp_path)
    assert same(result, usual)
    assert result.history[: len(LOOKS)] == found.history
    assert mnp_fast.scan(model, loader(), ALWAYS, progress=False, checkpoint=tmp_path).report() == found.report()


OTHER = replace(
    ALWAYS,
    alpha=0.6,
    penalty=1e-3,
    mask_rate=0.04,
    mask_steps=20,
    threshold=0.6,
    accuracy_limit=0.1,
    finetune_epochs=1,
    finetune_rate=5e-3,
    perturbed_pictures=0.5,
    distillation=0.4,
    evidence_score=0.2,
    suspicion_score=0.1,
)


@pytest.mark.parametrize("count", [2, len(NAMES)])
def test_another_repair_goes_on_from_the_evidence(model: nn.Module, whole: Path, tmp_path: Path, count: int) -> None:
    differing = {name for name, value in asdict(OTHER).items() if value != getattr(ALWAYS, name)}
    assert differing == BEYOND_LOOKS
    folder = up_to(whole, count, tmp_path)
    before = run(model, checkpoint=whole).history
    result = run(model, config=OTHER, checkpoint=folder)
    assert same(result, run(model, config=OTHER))
    shared = min(count, len(LOOKS))
    assert result.history[:shared] == before[:shared]
    assert stages(result) == [*LOOKS, *REPAIR]
    assert not any(entry in before for entry in result.history[shared:])
    # And back.
    assert same(run(model, checkpoint=folder), run(model, checkpoint=whole))


def test_what_no_look_reads(model: nn.Module) -> None:
    read: set[str] = set()

    class Noted(PruneConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    config = Noted(**asdict(ALWAYS))
    exposing = run_module.Run(model, loader(), config, None, 0, False)
    read.clear()
    with exposing.stages():
        exposing.look(exposing.learning, exposing.data, "")
    assert not read & BEYOND_LOOKS
    assert {"suppression_rate", "perturbation_size", "evidence_size"} <= read


def test_where_no_class_is_named(model: nn.Module, tmp_path: Path) -> None:
    result = run(model, config=SHORT)
    assert result.suspected_target is None
    run(model, config=SHORT, checkpoint=tmp_path)
    assert same(run(model, config=SHORT, checkpoint=tmp_path), result)


def test_the_callers_random_state_is_left_alone(model: nn.Module, whole: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(model, checkpoint=whole)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- another run
def other_model(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0] *= 1.5
    return other


def with_other_stride(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other[3].stride = (2, 2)
    return other


def test_another_run_is_refused(model: nn.Module, whole: Path) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    others: list[tuple[str, dict[str, Any]]] = [
        ("weights", {"model": other_model(model)}),
        ("layers", {"model": with_other_stride(model)}),
        ("pictures", {"given": [(images + 0.01, labels)]}),
        ("config", {"config": replace(ALWAYS, perturbation_size=0.3)}),
        ("config, settings of the repair", {"config": replace(ALWAYS, batch_size=41, alpha=0.6)}),
        ("seed", {"seed": 1}),
    ]
    for name, changed in others:
        options = {"model": model, "checkpoint": whole} | changed
        told = rf"is of another run .*\(different: {name}\).* name an empty directory"
        with pytest.raises(ConfigError, match=told):
            run(**options)


def test_products_of_another_machine_are_refused(
    model: nn.Module, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same settings mean bfloat16 on one processor and float32 on another."""
    usual = run_module.product_dtype("auto", CPU)
    monkeypatch.setattr(run_module, "product_dtype", lambda *_: torch.bfloat16 if usual is None else None)
    with pytest.raises(ConfigError, match=r"\(different: products\)"):
        run(model, checkpoint=whole)


def test_another_class_and_device_are_others(model: nn.Module) -> None:
    class Mine(nn.Sequential):
        pass

    data = DefenceSet(*next(iter(loader())))
    parts = [
        fingerprint(net, data, ALWAYS, 0, torch.device(device), "float32")
        for net, device in ((model, "cpu"), (Mine(*model), "cpu"), (model, "cuda"))
    ]
    assert {name for name in parts[0] if parts[0][name] != parts[1][name]} == {"model", "layers"}
    assert {name for name in parts[0] if parts[0][name] != parts[2][name]} == {"device"}


def test_another_torch_is_refused(model: nn.Module, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    with pytest.raises(ConfigError, match=r"\(different: torch\)"):
        run(model, checkpoint=whole)


def test_goes_on_after_each_stage_with_waves(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the looks found waves, which the repair uses, these come back from the files."""
    picture = torch.linspace(-1, 1, 36).view(1, 6, 6)
    made: list[Wave] = []

    def find(*_: object) -> Wave:
        made.append(Wave(1, 0.8 + 0.05 * len(made), (len(made) + 1) * picture, 100))
        return made[-1]

    monkeypatch.setattr(run_module, "find_wave", find)
    used: list[torch.Tensor] = []
    learn = run_module.learn_masks
    monkeypatch.setattr(run_module, "learn_masks", lambda *args: used.append(args[2]) or learn(*args))
    usual = run(model, checkpoint=tmp_path / "whole")
    assert usual.suspected_target == 1
    assert any(torch.equal(one, 3 * picture) for one in used[0])
    for count in range(len(NAMES)):
        # Only the looks that are not there search again.
        made[:] = made[: sum(name.startswith("search") for name in NAMES[:count])]
        assert same(run(model, checkpoint=up_to(tmp_path / "whole", count, tmp_path / str(count))), usual)
    assert all(torch.equal(one, used[0]) for one in used)


@pytest.mark.parametrize(("name", "other"), [("__version__", "0.0.0"), ("_SOURCES", "0" * 16)])
def test_another_version_is_refused(
    model: nn.Module, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    monkeypatch.setattr(checkpoint, name, other)
    with pytest.raises(ConfigError, match=r"different: mnp_fast\)"):
        run(model, checkpoint=whole)


# ---------------------------------------------------------------- files
def test_a_damaged_file_is_refused(model: nn.Module, whole: Path, tmp_path: Path) -> None:
    folder = up_to(whole, 2, tmp_path)
    file = folder / "stage-search.safetensors"
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"x" * len(content)):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match=r"stage-search.safetensors is damaged.* delete it"):
            run(model, checkpoint=folder)


def test_a_directory_that_cannot_be_written_is_said_first(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written to"):
        run(model, checkpoint=tmp_path / "file")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint(tmp_path, {"seed": "0"}, torch.Generator(), CPU)
    kept.write("one", StageState({"a": torch.arange(3)}, {"b": 1}))

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnp_fast.io.save_file", fails)
    with pytest.raises(FileError, match="No space left"):
        kept.write("one", StageState({"a": torch.arange(4)}))
    assert [file.name for file in tmp_path.iterdir()] == ["stage-one.safetensors"]
    found = kept.read("one")
    assert found is not None
    assert found.tensors["a"].tolist() == [0, 1, 2]
    assert found.values == {"b": 1}


def test_random_generators_go_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        kept = Checkpoint(tmp_path, {}, generator, CPU)
        torch.rand(7, generator=generator)
        torch.rand(5)
        kept.write("one", StageState())
        wanted = torch.rand(4, generator=generator), torch.rand(4)
        torch.rand(9, generator=generator)
        kept.read("one")
        assert torch.equal(torch.rand(4, generator=generator), wanted[0])
        assert torch.equal(torch.rand(4), wanted[1])


def test_nothing_is_kept_without_a_directory() -> None:
    kept = Checkpoint(None, {}, torch.Generator(), CPU)
    kept.write("one", StageState())
    assert kept.read("one") is None


def test_tensors_of_a_model(model: nn.Module) -> None:
    other = small()
    tied = nn.ModuleList([other, other])
    restore_(other, {name: tensor.clone() for name, tensor in model_tensors(model).items()})
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    restore_(tied, model_tensors(tied))
    assert equal(dict(tied[1].state_dict()), dict(model.state_dict()))


def test_addresses_are_not_of_the_fingerprint(model: nn.Module) -> None:
    class Named(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.other = net, object()

        def extra_repr(self) -> str:
            return str(self.other)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    data = DefenceSet(*next(iter(loader())))
    both = [Named(model), Named(model)]
    assert repr(both[0]) != repr(both[1])
    found = [fingerprint(network, data, ALWAYS, 0, CPU, "float32") for network in both]
    assert found[0] == found[1]


def test_weights_in_bfloat16_have_a_fingerprint(model: nn.Module, tmp_path: Path) -> None:
    narrow = copy.deepcopy(model).bfloat16()
    result = run(narrow, checkpoint=tmp_path)
    assert equal(state(run(narrow, checkpoint=tmp_path)), state(result))
