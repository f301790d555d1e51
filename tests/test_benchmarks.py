"""The benchmarks: rows complete and right on a tiny network, files, percentiles, counted steps, tables and figures."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import types
from collections import Counter
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import mnp_fast
from benchmarks import end_to_end, ops, plot, results_file, stats, step
from benchmarks.digits import SmallNet
from benchmarks.environment import environment, environment_key, same_environment
from benchmarks.memory import held_mb, peak_mb
from benchmarks.models import Workload, of_model, randomize_
from benchmarks.providers import Check, MnpFast, Published, Tuned
from benchmarks.published import Counts, Stages
from benchmarks.timing import interleaved, percentile, summary
from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import masked
from mnp_fast.sites import find_sites
from mnp_fast.stats import magnitude

CPU = torch.device("cpu")


class TinyFormer(nn.Module):
    """A convolution without norm, torch's own attention, and an MLP: every kind of site but BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def tiny(network: type[nn.Module] = SmallNet, batch: int = 6) -> Workload:
    torch.manual_seed(0)
    model = randomize_(network()).eval()
    return of_model(network.__name__, model, torch.randn(batch, 1, 16, 16))


# ---------------------------------------------------------------- step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [SmallNet, TinyFormer])
def test_step_rows_are_complete_and_match(network: type[nn.Module], dtype: torch.dtype) -> None:
    names = ["published", "tuned_eager", "mnp_fast"]
    rows = step.measure(tiny(network), dtype, names, repeats=2)
    assert [row["provider"] for row in rows] == names
    wanted = {"arch", "batch", "dtype", "device", "threads", "median_ms", "p20_ms", "p80_ms", "peak_mb", "match"}
    for row in rows:
        assert wanted <= row.keys()
        assert row["match"], row
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["peak_mb"] > 0
        assert abs(row["held_mb"]) < 20  # of networks of kilobytes
    json.dumps(rows)
    assert step.show(rows).row_count == 3


@pytest.mark.parametrize(
    "make", [Published, lambda work: Tuned(work, torch.float32), lambda work: MnpFast(work, torch.float32)]
)
def test_the_check_sees_a_wrong_gradient(make: Any) -> None:
    work = tiny()
    name = "published" if make is Published else "mnp_fast"
    check = Check(work, [name], torch.float32)
    wrong = Workload(**{**work.__dict__, "mask": work.mask * 0.9})
    for given, expected in ((work, True), (wrong, False)):
        made = make(given)
        loss = float(made())
        assert check(name, made, loss)["match"] is expected
        assert check(name, made, math.nan)["match"] is False
        made.close()


def test_providers_go_the_same_way_over_several_steps() -> None:
    work = tiny()
    tuned, ours = Tuned(work, torch.float32), MnpFast(work, torch.float32)
    for _ in range(4):
        tuned()
        ours()
    torch.testing.assert_close(tuned.mask(), ours.mask(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(tuned.mask(), work.mask)
    ours.close()


# ---------------------------------------------------------------- time, memory, files
def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([10.0, 0.0, 5.0], 0.2) == pytest.approx(2.0)
    assert percentile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}


def test_calls_are_taken_in_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = interleaved(calls, 3, CPU)
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(order[6:]) == "abcbcacab"
    order.clear()
    assert [len(values) for values in interleaved(calls, 1, CPU, settle=True).values()] == [1, 1, 1]
    assert "".join(order[6:]) == "aabbcc"


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        third = second * 2
        del second, third

    assert peak_mb(call, CPU) == pytest.approx(8.0, abs=0.01)
    assert held_mb(call, CPU) == pytest.approx(0.0, abs=2.0)
    assert held_mb(lambda: torch.zeros(50_000_000) + 1, CPU) == pytest.approx(200.0, abs=4.0)


def test_results_file_adds_replaces_and_refuses(tmp_path, monkeypatch) -> None:
    file = tmp_path / "new" / "rows.json"
    here = environment("cpu", [1])
    row = {"arch": "a", "batch": 8, "dtype": "float32", "provider": "published", "median_ms": 2.0}
    results_file.save(file, "step", here, [row, row | {"provider": "mnp_fast"}])
    results_file.save(file, "step", here, [row | {"median_ms": 1.0}])
    content = json.loads(file.read_text())
    assert content == results_file.load(file)
    assert {key: content["environment"][key] for key in here} == here
    assert [(r["provider"], r["median_ms"]) for r in content["rows"]] == [("mnp_fast", 2.0), ("published", 1.0)]
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(SystemExit, match=r"another environment \(torch\)"):
        results_file.save(file, "step", here | {"torch": "0"}, [row])
    for text in ("", "[]", "{}", "[1"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(SystemExit, match=r"other\.json is no results file"):
            results_file.load(tmp_path / "other.json")
    with pytest.raises(SystemExit, match=r"none\.json is no results file"):
        results_file.load(tmp_path / "none.json")
    monkeypatch.setattr(results_file.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results_file.save(file, "step", here, [row])
    assert json.loads(file.read_text()) == content
    assert list(file.parent.iterdir()) == [file]


def test_environment_names_a_file() -> None:
    found = {
        "device": "Some CPU (R), 2 cores",
        "cpu": "Some CPU (R), 2 cores",
        "threads": [1, 2],
        "torch": "2.13.0+cpu",
    }
    assert environment_key(found) == "some-cpu-r-2-cores-1-2-threads-torch-2.13.0"
    assert environment_key(found | {"device": "NVIDIA H100"}) == "nvidia-h100-torch-2.13.0"
    assert same_environment(found | {"date": "a"}, found | {"date": "b", "new": 1})
    assert not same_environment(found, found | {"threads": 1})


# ---------------------------------------------------------------- ops and stats
def test_ops_rows(monkeypatch) -> None:
    case = next(ops.cases(CPU, torch.float32, 2))
    small = ops.Case(**{**case.__dict__, "shape": (2, 4, 5, 5), "make": _small_arguments})
    rows = ops.measure(small, CPU, repeats=2)
    assert [(row["op"], row["provider"]) for row in rows] == [
        (f"masked_affine {direction}", provider)
        for direction in ("forward", "backward")
        for provider in ("tuned_eager", "mnp_fast")
    ]
    for row in rows:
        assert row["match"], row
        assert row["of_copy"] == pytest.approx(row["copy_ms"] / row["median_ms"], rel=0.01)
        assert row["bytes"] == (2 if "forward" in row["op"] else 3) * 2 * 4 * 25 * 4
    assert ops.show(rows).row_count == 4
    right = ops.ops.masked_affine
    monkeypatch.setattr(ops.ops, "masked_affine", lambda *args, **options: 1.01 * right(*args, **options))
    assert [row["match"] for row in ops.measure(small, CPU, repeats=1)] == [True, False, True, False]


def _small_arguments() -> list[Tensor]:
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    return [x, torch.rand(4, requires_grad=True), *(torch.rand(4) for _ in range(3))]


SMALLEST = {
    f"{case.op} {case.case}": case
    for case in ops.cases(CPU, torch.float32, 1)
    if case.memory != "channels_last"
    and case.case != "beyond cache"
    and case.shape[-1] in (28, 768, 3072, 26560, 37776)
}


@pytest.mark.parametrize("case", SMALLEST.values(), ids=SMALLEST.keys())
def test_every_op_of_the_table_in_plain_torch(case: ops.Case) -> None:
    arguments = case.make()
    expected = ops._results(case, case.eager, ops._in_float64(arguments))
    assert ops._errors(ops._results(case, case.eager, ops._fresh(case, arguments)), expected) < 1e-5
    # x and the mask, or whatever is changed in place.
    assert len(expected) == case.in_place or expected[0].shape == arguments[0].shape == expected[1].shape


def test_plain_loop_is_a_difference_of_losses() -> None:
    work = tiny()
    found = stats.plain_loop(work, torch.tensor([0, 40, 191]))
    ones = torch.ones_like(work.mask)
    before = _loss(work, ones)
    for neuron, change in zip((0, 40, 191), found.tolist(), strict=True):
        without = ones.clone()
        without[neuron] = 0
        assert change == pytest.approx(_loss(work, without) - before, abs=2e-6)
    assert found.abs().max() > 1e-4


def _loss(work: Workload, mask: Tensor) -> float:
    with masked(work.model, work.sites, mask), torch.no_grad():
        return float(nn.functional.cross_entropy(work.model(work.images), work.labels))


# ---------------------------------------------------------------- whole runs
def digits_run(count: int = 60) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    images, labels = end_to_end.pictures(count, 16)
    images = images[:, :1]
    model = randomize_(SmallNet()).eval()
    end_to_end.fit_head_(model, images, labels)
    return model, (images, labels)


def test_the_fitted_network_knows_its_pictures() -> None:
    model, (images, labels) = digits_run()
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    torch.testing.assert_close(end_to_end.pictures(60, 16)[0][:, :1], images)
    # Under the statistics of a batch too, or there is nothing to suppress.
    with masked(model, (), None, batch_statistics=True), torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.9


def test_counted_steps_are_those_of_the_run(monkeypatch) -> None:
    model, data = digits_run()
    config = PruneConfig(
        batch_size=16,
        perturbations=3,
        perturbation_steps=2,
        mask_steps=12,
        finetune_epochs=2,
        suspicion_score=0,
        evidence_score=0,
    )
    calls: Counter[str] = Counter()
    held = round(0.2 * len(data[1]))

    def counting(module: Any, name: str, label: Any) -> None:
        inner = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[label(*args) if callable(label) else label] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    optimize, run, select = (importlib.import_module(f"mnp_fast.{name}") for name in ("optimize", "run", "select"))
    counting(optimize, "expose", "suppress")
    counting(optimize, "pull", "perturb")
    counting(optimize, "eliminate", "masks")
    counting(optimize, "repair_loss", "finetune")
    counting(select, "predictions", lambda network, part, *_: f"select {len(part)}")
    counting(run, "predict", lambda network, part, *_: f"run {len(part)}")
    counting(optimize, "predict", lambda network, part, *_: f"optimize {len(part)}")
    result = mnp_fast.prune(model, [data], config, progress=False)
    learning, _ = DefenceSet(*data).split(config.held_back, torch.Generator().manual_seed(0))
    counts = end_to_end.counts_of(result.history, learning, config)
    assert calls["masks"] == counts.masks == 12
    assert calls["finetune"] == counts.finetune
    assert calls[f"select {held}"] == counts.plain
    # An answer that is certain after the held-back pictures asks for no others.
    assert 0 < calls[f"select {len(learning)}"] <= counts.plain
    searched, weighed = (end_to_end.entries(result.history, name) for name in ("search", "weigh"))
    looks = len(result.evidence["looks"])
    assert len(searched) == len(weighed) == looks == 3
    assert all(entry["perturbations"] == (3 if len(entry["classes"]) == 1 else 2) for entry in weighed)
    tried, perturbations = sum(entry["tried"] for entry in searched), sum(entry["perturbations"] for entry in weighed)
    assert calls["perturb"] == counts.search + counts.weigh + counts.perturb
    # Windows that were taken back are run and not counted.
    assert counts.suppress <= calls["suppress"]
    assert counts.search == 3 * tried
    assert counts.perturb == 6
    shown = {len(data[1]), *(int((data[1] != label).sum()) for entry in weighed for label in entry["classes"])}
    assert sum(calls[f"run {size}"] for size in shown) == looks + perturbations
    # New statistics of each look, and the answers of the teacher.
    assert calls[f"optimize {len(learning)}"] == looks + 1
    # Classes to try, and what each perturbation pulls in the suppressed model and in the model itself.
    assert calls[f"run {len(learning)}"] == looks
    sizes = {int((learning.labels != label).sum()) for label in range(10)}
    assert sum(calls[f"run {size}"] for size in sizes) == 2 * tried
    share, others = len(learning) / len(data[1]), 0.9
    waved = sum(entry["waved"] for entry in searched) / len(learning)
    assert counts.search_evaluations == round((2 * looks + 2 * tried * others + waved) * share)
    assert counts.weigh_evaluations == round(looks + perturbations * others)


def test_a_look_at_half_of_the_pictures_counts_half() -> None:
    learning = DefenceSet(torch.zeros(80, 1), torch.arange(80) % 10)
    config = PruneConfig(batch_size=16, held_back=0.2, perturbation_steps=4)
    history: list[dict[str, Any]] = [
        {"stage": "suppress", "windows": 3, "pictures": 80},
        {"stage": "search", "tried": 10, "waved": 160},
        {"stage": "weigh", "perturbations": 6},
        {"stage": "suppress-2", "windows": 2, "pictures": 40},
        {"stage": "search-2", "tried": 10, "waved": 80},
        {"stage": "weigh-2", "perturbations": 6},
        {"stage": "masks", "steps": 9},
        {"stage": "select", "pruned": 0, "low": 0},
    ]
    counts = end_to_end.counts_of(history, learning, config)
    assert counts.suppress == 3 * 5 + 2 * 3
    assert counts.search_evaluations == round(0.8 * (1.5 * (2 + 2 * 10 * 0.9) + 240 / 80))
    assert counts.weigh_evaluations == round(1.5 * (1 + 6 * 0.9))
    assert (counts.search, counts.weigh, counts.masks, counts.finetune) == (20 * 6, 12 * 4, 9, 0)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (3, 17), (18, 17), (0, 100), (64, 100)])
def test_probes_of_a_bisection(first: int, last: int) -> None:
    from mnp_fast.select import smallest

    asked: list[int] = []
    assert smallest(lambda count: asked.append(count) or count >= first, last) == first  # type: ignore[func-returns-value]
    assert end_to_end.probes(first, last) == len(asked)


@pytest.mark.parametrize("full", [False, True])
def test_published_stages_run_and_match(full: bool) -> None:
    model, data = digits_run()
    sites = find_sites(model, data[0][:2])
    learning, held = DefenceSet(*data).split(0.2, torch.Generator().manual_seed(0))
    counts = Counts(7, 2, 1, search=3, weigh=3, perturb=3, masks=8, plain=2, finetune=4)
    config = PruneConfig(batch_size=16)
    stages = Stages(model, sites, magnitude(model, sites), learning, held, config, torch.float32, compiled=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row = end_to_end.run(stages, counts, 2, full=full)
    assert row["match"], row
    assert row["extrapolated"] is not full
    # Three batches of learning pictures: a warm-up and a pass, where not all steps are made.
    assert row["measured_steps"]["masks"] == (8 if full else 6)
    assert row["measured_steps"]["fine-tune"] == (4 if full else 12)
    assert row["seconds"] == pytest.approx(sum(row["stages_s"].values()), abs=0.03)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------- pages and figures
def test_tables_stand_between_their_markers() -> None:
    text = (
        "a\n<!-- benchmark:step -->\nold\n<!-- /benchmark -->\nb\n<!-- benchmark:other -->\nkept\n<!-- /benchmark -->\n"
    )
    new, names = plot.replace_tables(text, {"step": "| new |"})
    assert names == ["step"]
    assert new == text.replace("old", "| new |")
    assert plot.replace_tables(new, {"step": "| new |"})[0] == new
    empty = "<!-- benchmark:step -->\n<!-- /benchmark -->"
    assert plot.replace_tables(empty, {"step": "x"})[0] == "<!-- benchmark:step -->\nx\n<!-- /benchmark -->"


def ops_rows() -> list[dict[str, Any]]:
    case = next(ops.cases(CPU, torch.float32, 2))
    small = ops.Case(**{**case.__dict__, "shape": (2, 4, 5, 5), "make": _small_arguments})
    return ops.measure(small, CPU, repeats=1)


def end_to_end_rows() -> list[dict[str, Any]]:
    stages = dict.fromkeys(end_to_end.STAGES, 1.0)
    row = {"arch": "a", "size": 32, "pictures": 60, "batch": 16, "dtype": "float32", "provider": "mnp_fast"}
    row |= {"stages_s": stages, "compile_s": 0.0, "extrapolated": False, "match": True} | end_to_end._total(4.0)
    return [row | {"provider": "published", "extrapolated": True} | end_to_end._total(10.0), row]


def cells(table: str) -> list[list[str]]:
    """Of the rows of a markdown table, which must be of equal length."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    return rows[:1] + rows[2:]


def test_tables_of_results_files(tmp_path) -> None:
    here = environment("cpu", [2])
    rows = step.measure(tiny(), torch.float32, ["published", "mnp_fast"], repeats=1)
    rows[0] |= {"median_ms": 300.0, "match": False}
    rows[1] |= {"median_ms": 100.0}
    results_file.save(tmp_path / "step" / "here.json", "step", here, rows)
    results_file.save(tmp_path / "zoo" / "here.json", "zoo", here, [{"case": "not a table of this kind"}])
    found = plot.read(tmp_path)
    assert found.keys() == {"step"}
    table = plot.tables("step", found["step"])
    assert "2 threads" in table
    assert len(cells(table)) == 2
    assert "300 (mismatch)" in table
    assert "| 3.00 |" in table


def test_table_of_ops_has_the_largest_input_and_all_threads() -> None:
    rows = ops_rows()
    for row in rows:
        row |= {"threads": 1, "median_ms": 6.0 if row["provider"] == "tuned_eager" else 2.0, "of_copy": 0.5}
    smaller = [row | {"shape": [1, 4, 5, 5], "bytes": row["bytes"] // 2, "median_ms": 77.0} for row in rows]
    two = [row | {"threads": 2, "median_ms": 1.0, "match": False} for row in rows if row["provider"] == "mnp_fast"]
    head, *lines = cells(plot.ops_table([*smaller, *rows, *two]))
    assert head[5:] == ["ms, 1 thread", "of copy", "x plain torch", "ms, 2 threads", "of copy", "x plain torch"]
    assert [line[0] for line in lines] == ["masked_affine forward", "masked_affine backward"]
    assert lines[0][2] == "2x4x5x5"
    assert lines[0][5:9] == ["2", "0.5", "3.00", "1 (mismatch)"]
    compiled = [row | {"provider": "torch_compile", "median_ms": 3.0} for row in rows]
    head, *lines = cells(plot.ops_table([*rows, *compiled]))
    assert head[5:] == ["ms", "of copy", "x plain torch", "x torch_compile"]
    assert lines[0][5:] == ["2", "0.5", "3.00", "1.50"]


def test_table_of_statistics_keeps_sizes_apart() -> None:
    rows = [row | {"median_ms": 4.0} for part in stats.measure(tiny(), 3, 1) for row in part]
    larger = [row | {"size": 99} for row in rows if row["provider"] == "mnp_fast"]
    _, *lines = cells(plot.stats_table([*rows, *larger]))
    assert [line[0] for line in lines] == ["saliency", "exact saliency of 3", "magnitude"] * 2
    assert [line[1] for line in lines] == ["SmallNet, 16x16"] * 3 + ["SmallNet, 99x99"] * 3
    assert lines[0][3:6] == ["4", "4", "1.00"]


def test_table_of_whole_runs() -> None:
    rows = end_to_end_rows()
    rows[1]["match"] = False
    _, *lines = cells(plot.end_to_end_table(rows))
    assert [line[-2:] for line in lines] == [["10 (extrapolated)", "2.50"], ["4 (mismatch)", "1.00"]]


def test_pages_have_a_place_for_every_table() -> None:
    text = "".join(page.read_text() for page in plot.PAGES)
    # Those of the defence, SECTION-TABLE, are filled by the command of their own.
    assert sorted(re.findall("<!-- benchmark:([^-]*) -->", text)) == sorted(plot.TABLES)


def test_pages_show_the_committed_rows() -> None:
    by_name = {name: plot.tables(name, contents) for name, contents in plot.read(results_file.FOLDER).items()}
    for page in plot.PAGES:
        assert plot.replace_tables(page.read_text(), by_name)[0] == page.read_text(), "python -m benchmarks.plot"


def test_tables_are_written_where_figures_cannot_be_drawn(tmp_path, monkeypatch) -> None:
    results_file.save(tmp_path / "ops" / "here.json", "ops", environment("cpu", [2]), ops_rows())
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:ops -->\n<!-- /benchmark -->\n<!-- benchmark:stats -->\n<!-- /benchmark -->\n")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    arguments = ["plot", "--results", str(tmp_path), "--page", str(page), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="figures need matplotlib"):
        plot.main()
    assert "| masked_affine backward |" in page.read_text()
    assert page.read_text().endswith("<!-- benchmark:stats -->\n<!-- /benchmark -->\n")


def test_figures_have_a_bar_for_every_row(tmp_path, monkeypatch) -> None:
    axes, figure = MagicMock(), MagicMock()
    pyplot = types.ModuleType("matplotlib.pyplot")
    pyplot.__dict__.update(rcParams={}, subplots=lambda **_: (figure, axes), close=lambda _: None)
    package = types.ModuleType("matplotlib")
    package.pyplot = pyplot  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    content = {"environment": environment("cpu", [2])}
    found = {
        "ops": {"here": content | {"rows": ops_rows()}},
        "end_to_end": {"here": content | {"rows": end_to_end_rows()}},
    }
    found["stats"] = {"here": content | {"rows": []}}
    drawn = plot.draw(found, tmp_path)
    assert [file.name for file in drawn] == ["ops-here.svg", "end_to_end-here.svg"]
    assert [call.args[0] for call in figure.savefig.call_args_list] == drawn
    bars = [(call.kwargs["label"], len(call.args[1])) for call in axes.barh.call_args_list]
    assert bars == [("tuned_eager", 2), ("mnp_fast", 2), ("published", 1), ("mnp_fast", 1)]
    for call in axes.barh.call_args_list:
        below, above = call.kwargs["xerr"]
        assert min(*below, *above) >= 0
    assert "published: extrapolated" in axes.set_xlabel.call_args.args[0]
