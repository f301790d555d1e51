"""Rows, files and tables of the defence benchmark."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import digits, results_file
from benchmarks.defense import case as cases
from benchmarks.defense import networks, run, table, zoo
from benchmarks.defense.attacks import make
from benchmarks.defense.baselines.common import Repair
from benchmarks.defense.case import Case
from mnp_fast import MnpFastError, PruneConfig

ZOO = """
import numpy as np
import torch
from dataclasses import dataclass
from typing import Any

@dataclass
class Case:
    model: Any
    dataset: str
    preprocess: Any
    trigger: Any
    target: Any

CASES = ["tiny_noise_badnets", "clean_noise_tiny"]

def load(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    trigger = None if name.startswith("clean") else lambda x: np.maximum(x, 200).astype(np.uint8)
    preprocess = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 0.5
    return Case(model, "noise", preprocess, trigger, None if trigger is None else 1)

def images(dataset, split):
    made = np.random.default_rng(len(split))
    return made.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "zoo.py").write_text(ZOO)
    return tmp_path


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(given)


# ---------------------------------------------------------------- pictures
def test_defence_pictures_are_nested() -> None:
    few, many = run.drawn(1000, 50, 7), run.drawn(1000, 200, 7)
    assert set(few.tolist()) < set(many.tolist())
    assert torch.equal(many, many.unique())
    assert not torch.equal(few, run.drawn(1000, 50, 8))


def test_shifts() -> None:
    row = torch.linspace(0, 255, 32).round().to(torch.uint8)
    images = row.expand(2, 3, 32, 32).contiguous()
    kept = images.clone()
    assert torch.equal(run.shifted(images, "none"), images)
    bright = run.shifted(images, "brightness")
    assert torch.equal(bright, (images.double() * 1.2).round().clamp(max=255).to(torch.uint8))
    crop = run.shifted(images, "crop").float()
    assert crop.shape == images.shape
    # The inner 28 columns, stretched to 32.
    centres = (torch.arange(32) + 0.5) * 28 / 32 + 1.5
    expected = (centres * 255 / 31).clamp(row[2], row[29])
    assert (crop[0, 0, 0] - expected).abs().max() < 1.5
    jpeg = run.shifted(images, "jpeg")
    assert not torch.equal(jpeg, images)
    assert (jpeg.float() - images.float()).abs().mean() < 6
    assert torch.equal(images, kept)


# ---------------------------------------------------------------- rows
def half_dead(count: int) -> Any:
    """A defence that prunes the first neurons."""

    def repair(model: Any, data: Any, seed: int = 0, config: Any = None) -> Repair:
        repaired = digits.SmallNet().eval()
        repaired.load_state_dict(model.state_dict())
        with torch.no_grad():
            repaired.norms[0].weight[:count] = 0
        evidence = {"score": 0.6}
        order = torch.arange(192)
        return Repair(repaired, None, order, count, 192, 1.5, {"rank": 1.0}, 10.2, "suspicious", 2, evidence)

    return repair


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.METHODS, "half_dead", half_dead(8))
    data = digits.load()
    grey = [(part[0] * 255).round().to(torch.uint8).expand(-1, 3, -1, -1) for part in (data.train, data.test)]
    model = digits.train(data, backdoored=True, epochs=2)
    case = Case(
        "tiny", model, "digits", "badnets", "SmallNet", lambda x: x[:, :1], digits.add_trigger, torch.zeros_like, 0
    )
    job = run.Job("tiny", 40, 1, "half_dead", "jpeg", json.dumps({"alpha": 0.5}), 100)
    pictures = (grey[0], data.train[1], grey[1], data.test[1])
    twin = half_dead(16)(model, None).model
    row = run.measure(case, pictures, job, PruneConfig(alpha=0.5), twin, oracle=True)
    assert run.key(json.loads(json.dumps(row))) == job
    pick = run.drawn(len(data.test[1]), 100, 0)
    images, labels = grey[1][pick, :1].float() / 255, data.test[1][pick]
    repaired = half_dead(8)(model, None).model
    attacked, others = digits.add_trigger(images[labels != 0]), labels[labels != 0]
    wanted = torch.zeros_like(others)
    for when, network in (("before", model), ("after", repaired)):
        assert row[f"acc_{when}"] == pytest.approx(digits.accuracy(network, images, labels), abs=1e-6)
        assert row[f"asr_{when}"] == pytest.approx(digits.accuracy(network, attacked, wanted), abs=1e-6)
        assert row[f"racc_{when}"] == pytest.approx(digits.accuracy(network, attacked, others), abs=1e-6)
    assert row["asr_clean"] == pytest.approx(digits.accuracy(twin, attacked, wanted), abs=1e-6)
    assert 0 < row["asr_clean"] < row["asr_before"]
    assert run.measure(case, pictures, job, PruneConfig(alpha=0.5), oracle=False)["asr_clean"] is None
    drops = [max(0.0, row[f"{name}_before"] - row[f"{name}_after"]) for name in ("asr", "acc")]
    assert row["der"] == pytest.approx((drops[0] - drops[1] + 1) / 2)
    assert row["oracle_der"] >= row["der"] - 1e-6
    assert {"pruned": 8, "neurons": 192, "seconds": 1.5, "verdict": "suspicious"}.items() <= row.items()


def test_der() -> None:
    assert run.der((0.9, 1.0, 0.0), (0.85, 0.1, 0.8)) == pytest.approx((0.9 - 0.05 + 1) / 2)
    assert run.der((0.9, 0.5, 0.4), (0.95, 0.6, 0.3)) == 0.5
    assert run.der((0.9, None, None), (0.8, None, None)) is None


def test_counts_of_the_oracle() -> None:
    counts = run.oracle_counts(1000, 333)
    assert counts[:2] == [0, 1]
    assert {333, 500} <= set(counts)
    assert counts == sorted(set(counts))
    assert 15 <= len(counts) <= 21
    assert run.oracle_counts(1, 5) == [0, 1]


# ---------------------------------------------------------------- the command
def test_the_command_on_a_zoo(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = folder / "out" / "rows.json"
    given = ["--zoo", str(folder), "--json", str(out), "--pictures", "30", "--test", "40"]
    given += ["--methods", "clp", "clp_sigma", "--seeds", "0"]
    run.main(arguments(*given, "--shard", "1/2"))
    assert len(run.done(out)) == 2
    run.main(arguments(*given, "--config", "precision=float32", "--cases", "clean_noise_tiny"))
    run.main(arguments(*given))
    rows = results_file.load(out)["rows"]
    assert len(rows) == 6
    assert {row["case"]: (row["attack"], row["network"], row["target"]) for row in rows} == {
        "tiny_noise_badnets": ("badnets", "tiny", 1),
        "clean_noise_tiny": ("clean", "tiny", None),
    }
    assert all((row["der"] is None) == (row["attack"] == "clean") for row in rows)
    assert [row["config"] for row in rows].count({"precision": "float32"}) == 2
    capsys.readouterr()
    run.main(arguments(*given))
    assert capsys.readouterr().out == ""
    run.main(arguments(*given, "--again"))
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert len(results_file.load(out)["rows"]) == 6

    def refuse(*_: Any) -> None:
        raise MnpFastError("it cannot be done")

    monkeypatch.setitem(run.METHODS, "clp", refuse)
    with pytest.raises(SystemExit, match="2 repairs failed"):
        run.main(arguments(*given, "--again"))
    assert len(results_file.load(out)["rows"]) == 6


def test_a_zoo_keeps_pictures_exact(folder: Path) -> None:
    source = zoo.read(folder)
    case = source.case("tiny_noise_badnets")
    images, labels, *_ = source.pictures("noise")
    assert images.shape == (60, 3, 8, 8)
    raw, raw_labels = source.module.images("noise", "train")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), raw)
    assert np.array_equal(labels.numpy(), raw_labels)
    assert case.trigger is not None
    triggered = case.trigger(images.float() / 255)
    assert torch.equal((triggered * 255).round().to(torch.uint8), images.clamp(min=200))
    torch.testing.assert_close(case.preprocess(images.float() / 255), images.float() / 255 - 0.5)
    assert case.attacked_labels(torch.tensor([0, 1, 2])).tolist() == [1, 1, 1]
    clean = source.case("clean_noise_tiny")
    assert clean.attacked_labels(torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "alpha"], "give NAME=VALUE"),
        (["--config", "beta=1"], "no setting 'beta'"),
        (["--config", "alpha=2"], "alpha is 2"),
        (["--config", "mask_steps=1.5"], "invalid literal"),
        (["--cases", "another"], "no cases another"),
        (["--shard", "3/2"], "give I/N"),
        (["--shard", "one"], "give I/N"),
    ],
)
def test_bad_options(folder: Path, given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run.main(arguments("--zoo", str(folder), "--json", str(folder / "rows.json"), *given))


def test_pictures_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data cifar10=FILE"):
        run.Folder(tmp_path, {}).pictures("cifar10")
    with pytest.raises(SystemExit, match=r"there is no .*zoo\.py"):
        zoo.read(tmp_path / "nothing")


def test_the_twin_is_a_clean_network_trained_alike(tmp_path: Path) -> None:
    info = {"network": "resnet20", "data": "signs-of-the-road", "classes": 3, "mean": [0.5] * 3, "std": [0.2] * 3}
    model = networks.build("resnet20", 3)
    attack = make("badnets", target=1, classes=3)
    attack.prepare(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), None, torch.Generator())
    for name, one in ((cases.CLEAN, None), ("badnets", attack)):
        full = f"resnet20-{name}-signs-of-the-road-4"
        cases.save(tmp_path, model, one, info | {"name": full, "attack": name})
        model.head.bias.data += 1  # so that one is told from the other
    source = run.Folder(tmp_path, {})
    twin = source.twin(source.case("resnet20-badnets-signs-of-the-road-4"))
    assert twin is not None
    clean = cases.load(tmp_path / "resnet20-clean-signs-of-the-road-4.safetensors").model
    assert torch.equal(twin.head.bias, clean.head.bias)
    (tmp_path / "resnet20-clean-signs-of-the-road-4.safetensors").unlink()
    assert source.twin(source.case("resnet20-badnets-signs-of-the-road-4")) is None


def test_parts_share_all_jobs_out() -> None:
    jobs = [run.Job("case", 500, seed, "mnp", "none", "{}", 100) for seed in range(7)]
    parts = [run.shard(jobs, f"{number}/3") for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(job.seed for part in parts for job in part) == list(range(7))


# ---------------------------------------------------------------- the file
def score(share: float, batch_norms: bool = True) -> dict[str, Any]:
    return {"score": share, "batch_norms": batch_norms}


def made(case: str = "a", **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case, "pictures": 500, "seed": 0, "method": "mnp", "shift": "none", "config": {}, "test": 2000,
        "attack": "badnets", "network": "net", "data": "digits", "acc_before": 0.9, "acc_after": 0.88,
        "asr_clean": 0.04, "asr_before": 1.0, "asr_after": 0.1, "racc_before": 0.0, "racc_after": 0.8, "der": 0.94,
        "verdict": "evidence of a backdoor", "suspected_target": 0, "target": 0, "evidence": score(0.8),
        "pruned": 10, "neurons": 100, "seconds": 2.0, "peak_mb": 5, "stages": {},
    }  # fmt: skip
    return row | changes


def write(file: Path, first: int) -> None:
    torch.set_num_threads(1)
    for seed in range(first, first + 10):
        run.append(file, made(seed=seed))


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    # Not forked: this process has threads, whose locks a copy of it would wait for.
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write, args=(file, first), daemon=True) for first in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert sorted(row["seed"] for row in results_file.load(file)["rows"]) == list(range(20))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_row_is_replaced_by_its_job(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for row in (made(), made(acc_after=0.5), made(config={"alpha": 0.5}), made(shift="jpeg"), made(test=100)):
        run.append(file, row)
    rows = results_file.load(file)["rows"]
    assert len(rows) == 4
    assert len(run.done(file)) == 4
    assert [row["acc_after"] for row in rows].count(0.5) == 1


# ---------------------------------------------------------------- tables
SECTIONS = {
    "fresh": ("fresh",), "clean": ("clean", "fresh"), "label-consistent": ("label-consistent",),
    "zoo": ("zoo-three-looks",), "zoo-older": ("zoo",), "longer": ("longer", "architectures"), "full": ("full",),
    "defense": ("suite",),
}  # fmt: skip


def test_pages_show_the_committed_rows() -> None:
    found: dict[str, str] = {}
    for section, names in SECTIONS.items():
        contents = [results_file.load(results_file.FOLDER / "defense" / f"{name}.json") for name in names]
        found |= table.blocks(contents, section)
    for page in (table.ROOT / "README.md", table.ROOT / "docs" / "results.md"):
        text = page.read_text()
        shown, names = table.replace_tables(text, found)
        assert shown == text, f"{page.name}: python -m benchmarks.defense table ... --write"
        assert set(re.findall("<!-- benchmark:([^ ]*-[^ ]*) -->", text)) == set(names)


CLEAN = {
    "attack": "clean", "target": None, "der": None, "asr_before": None, "asr_after": None, "racc_before": None,
    "racc_after": None, "verdict": "no evidence found", "suspected_target": None,
}  # fmt: skip
ROWS = [
    made(seed=0),
    made(seed=1, acc_after=0.86, asr_after=0.3, der=0.83, suspected_target=4, evidence=score(0.6)),
    made(seed=0, method="anp", acc_after=0.8, asr_after=0.5, der=0.7, verdict=None, evidence=None, oracle_acc=0.85,
         oracle_asr=0.2, oracle_der=0.875),
    made("b", **CLEAN, acc_after=0.89, evidence=score(0.3)),
    made("c", **CLEAN | {"verdict": "evidence of a backdoor"}, acc_after=0.87, evidence=score(0.6)),
    made(pictures=100, acc_after=0.7, asr_after=0.0, der=0.9),
    made(shift="jpeg", der=0.5),
    made(config={"alpha": 0.9}, der=0.1),
]  # fmt: skip


def lines(text: str) -> list[list[str]]:
    parts = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(part) for part in parts}) == 1
    return parts


def test_table_of_cases() -> None:
    head, _, first, *_ = lines(table.tables(ROWS)["cases"])
    found = dict(zip(head, first, strict=True))
    assert found["case"] == "a"
    assert found["seeds"] == "2"
    assert found["ACC before"] == "0.900"
    assert first[3] == "0.870 +- 0.014"
    assert first[4:7] == ["0.040", "1.000", "0.200 +- 0.141"]
    assert found["worst"] == "0.300"
    assert found["DER"] == "0.885 +- 0.078"
    assert found["target named"] == "1 of 2"
    assert found["pruned"] == "10.0%"


def test_table_of_methods() -> None:
    _, _, *body = lines(table.tables(ROWS)["methods"])
    assert body == [
        ["mnp", "1", "0.020", "0.100", "0.100", "0.800", "0.940", "2.0", "", "", ""],
        ["anp", "1", "0.100", "0.500", "0.500", "0.800", "0.700", "2.0", "0.850", "0.200", "0.875"],
    ]
    _, _, *body = lines(table.methods_table(ROWS, "config"))
    assert [[*line[:3], line[7]] for line in body] == [
        ["alpha=0.9", "mnp", "1", "0.100"],
        ["defaults", "mnp", "1", "0.940"],
        ["defaults", "anp", "1", "0.700"],
    ]
    # Test-picked columns only where there is any.
    assert "test-picked" not in table.tables([row for row in ROWS if row["method"] == "mnp"])["methods"]
    _, _, *body = lines(table.methods_table(ROWS, "shift"))
    assert [line[:2] for line in body] == [["jpeg", "mnp"], ["none", "mnp"], ["none", "anp"]]


def test_table_of_pictures() -> None:
    _, _, *body = lines(table.tables(ROWS)["pictures"])
    # Seed 1 was not run with 100 pictures.
    assert [line[:3] for line in body] == [["100", "mnp", "1"], ["500", "mnp", "1"]]
    head, _, *body = lines(table.tables(ROWS)["curve"])
    assert [head, *body] == [["attack", "100", "500"], ["badnets", "0.000 (0.200)", "0.100 (0.020)"]]
    _, _, *body = lines(table.tables(ROWS)["shifts"])
    assert [line[0] for line in body] == ["jpeg", "none"]
    _, _, *body = lines(table.tables(ROWS)["configs"])
    assert [line[0] for line in body] == ["alpha=0.9", "defaults"]
    _, _, *body = lines(table.methods_table(ROWS, "attack"))
    assert [line[:3] for line in body] == [["badnets", "mnp", "2"], ["badnets", "anp", "1"]]


def test_table_of_clean_networks() -> None:
    _, _, *body = lines(table.tables(ROWS)["clean"])
    assert body == [["mnp", "2", "2", "0.020", "0.030", "1 (1) of 2"]]


def test_table_of_detection() -> None:
    _, _, *body = lines(table.tables(ROWS)["detection"])
    # .8 and .6 against .3 and .6: three wins and a tie.
    assert body == [["mnp", "badnets", "2", "0.875", "2 (2) of 2", "1 of 2", "1 (1) of 2"]]
    fooled = made("d", **CLEAN | {"verdict": "suspicious"}, acc_after=0.87, evidence=score(1.0, batch_norms=False))
    _, _, one, normed = lines(table.tables([*ROWS, fooled])["detection"])
    assert one == ["mnp", "badnets", "2", "0.583", "2 (2) of 2", "1 of 2", "1 (2) of 3"]
    assert normed == ["mnp", "all with BatchNorm", *body[0][2:]]
    assert table.auroc([0.5], []) is None
    assert table.auroc([0.1], [0.2]) == 0.0


def test_tables_are_written_between_markers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    for row in ROWS:
        run.append(file, row)
    page.write_text("a\n<!-- benchmark:defense-clean -->\nold\n<!-- /benchmark -->\nb\n")
    table.main(parser.parse_args([str(file), "--write", str(page)]))
    text = page.read_text()
    assert "| mnp | 2 | 2 | 0.020" in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("b\n")
    capsys.readouterr()
    table.main(parser.parse_args([str(file)]))
    assert "defense-detection" in capsys.readouterr().out
    table.main(parser.parse_args([str(file), "--by", "attack"]))
    assert "| badnets | mnp | 2 |" in capsys.readouterr().out


def test_tables_without_rows_stay_as_they_are(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    for row in ROWS:
        run.append(file, row | {"pictures": 100})
    page.write_text("<!-- benchmark:defense-cases -->\nold\n<!-- /benchmark -->\n")
    table.main(parser.parse_args([str(file), "--write", str(page)]))
    assert "old" in page.read_text()


def test_two_networks_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    files = [tmp_path / name for name in ("one.json", "other.json")]
    run.append(files[0], ROWS[0])
    run.append(files[1], ROWS[0] | {"acc_before": 0.125})
    with pytest.raises(SystemExit, match=r"two networks are named .* \(accuracy 0\.\d+ and 0\.1250\)"):
        table.main(parser.parse_args([str(file) for file in files]))


def test_a_folder_without_networks_is_said(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(["--models", str(tmp_path), "--data", "a=b", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit, match="has no networks"):
        run.main(args)
