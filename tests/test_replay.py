"""Replayed steps: equal to eager ones, whatever the shapes; given up with a reason and nothing lost where they fail."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_optimize import QUIET, quadrants, seeded, small, taught
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mnp_fast
from benchmarks import step as step_benchmark
from benchmarks.digits import SmallNet
from benchmarks.models import of_model, randomize_
from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution
from mnp_fast.optimize import learn_masks, perturb
from mnp_fast.replay import Recorder, Replayed, Results
from mnp_fast.run import Run
from mnp_fast.sites import find_sites

CONFIG = PruneConfig(batch_size=40, mask_steps=20, mask_rate=0.1)


class Tape(Recorder):
    """Stands for a GPU: runs what a graph would replay; results are empty before the first replay, as a graph's are."""

    def __init__(self, broken: BaseException | None = None) -> None:
        self.reason = None
        self.broken = broken
        self.recorded = self.replays = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        self.recorded += 1
        for _ in range(3):
            results = run()
        if self.broken is not None:
            raise self.broken
        for result in results:
            result.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(results, run(), strict=True):
                kept.copy_(new)

        return replay, results


class Counter:
    """A step with a state: adds the mean of its input to it, and spoils the input."""

    def __init__(self) -> None:
        self.total = torch.zeros(2, requires_grad=True)
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(x)
        with torch.no_grad():
            self.total += x.mean()
        mean = x.mean().detach()
        x += 100
        return mean, self.total.detach().clone()


def inputs(*lengths: int) -> list[Tensor]:
    return [torch.randn(length, 3, generator=seeded(i)) for i, length in enumerate(lengths)]


def outcomes(step: Callable[..., Results], given: Sequence[Tensor]) -> list[Results]:
    return [step(x.clone()) for x in given]


def equal(one: Sequence[Results], other: Sequence[Results]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


# ---------------------------------------------------------------- one step
def test_without_a_recorder_it_is_the_step_itself() -> None:
    counter = Counter()
    step = Replayed(counter, (counter.total,), None)
    x = torch.ones(3)
    step(x)
    assert len(counter.seen) == 1
    assert counter.seen[0] is x


def test_replays_are_what_eager_steps_are() -> None:
    given = inputs(4, 4, 4, 4)
    eager, counter, tape = Counter(), Counter(), Tape()
    # Kept to the end: what a call has given is not written over by the next.
    found = outcomes(Replayed(counter, (counter.total,), tape), given)
    assert equal(found, outcomes(eager, given))
    assert torch.equal(counter.total, eager.total)
    assert counter.total.requires_grad
    assert (tape.recorded, tape.replays, tape.reason) == (1, 4, None)
    # All from the same memory, which is none of the caller's.
    assert len({x.data_ptr() for x in counter.seen}) == 1


def test_warming_up_is_no_step() -> None:
    eager, counter = Counter(), Counter()
    x = inputs(4)[0]
    Replayed(counter, (counter.total,), Tape())(x.clone())
    eager(x.clone())
    assert torch.equal(counter.total, eager.total)
    assert len(counter.seen) > 1


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64)])
def test_other_shapes_run_eagerly(other: Tensor) -> None:
    given = [*inputs(4, 4), other, *inputs(4), other + 1]
    eager, counter, tape = Counter(), Counter(), Tape()
    assert equal(outcomes(Replayed(counter, (counter.total,), tape), given), outcomes(eager, given))
    assert torch.equal(counter.total, eager.total)
    assert (tape.recorded, tape.replays) == (1, 3)


def test_what_cannot_be_captured_runs_eagerly_once_and_for_all() -> None:
    given = inputs(4, 4, 2)
    tape = Tape(broken=RuntimeError("called a synchronizing operation\nand more lines"))
    for _ in range(2):  # another step of the same run does not try again
        eager, counter = Counter(), Counter()
        assert equal(outcomes(Replayed(counter, (counter.total,), tape), given), outcomes(eager, given))
        assert torch.equal(counter.total, eager.total)
    assert (tape.recorded, tape.replays) == (1, 0)
    assert tape.reason == "RuntimeError: called a synchronizing operation"


def test_the_reason_is_the_first_error() -> None:
    broken = RuntimeError("operation failed due to a previous error during capture")
    broken.__context__ = ValueError("not permitted when the stream is capturing")
    tape = Tape(broken)
    counter = Counter()
    Replayed(counter, (counter.total,), tape)(torch.ones(3))
    assert tape.reason == "ValueError: not permitted when the stream is capturing"


def test_an_interruption_goes_through_and_leaves_the_state() -> None:
    counter, tape = Counter(), Tape(broken=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        Replayed(counter, (counter.total,), tape)(torch.ones(3))
    assert not counter.total.any()
    assert tape.reason is None


def test_a_graph_is_gone_with_its_step() -> None:
    """By reference counts alone: it holds the memory of a whole step."""
    counter = Counter()
    step = Replayed(counter, (counter.total,), Tape())
    step(torch.ones(3))
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- the calls to CUDA
@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of the calls, on a machine without CUDA."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: object, name: str = "own") -> None:
            self.device, self.name = device, name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    @contextmanager
    def graph(_: object, stream: Stream) -> Iterator[None]:
        log.append(f"capture on {stream.name}")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "outside"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: log.append(f"waiting {mode}"))
    return log


def test_the_order_of_the_calls(cuda: list[str]) -> None:
    def step(x: Tensor) -> tuple[Tensor]:
        cuda.append("step")
        return (x + 1,)

    replayed = Replayed(step, (), Recorder(torch.device("cuda")))
    for _ in range(2):
        replayed(torch.ones(3))
    replayed(torch.ones(2))
    begin, end = ["own waits for outside", "on own"], ["off", "outside waits for own"]
    checked = ["waiting error", "step", "waiting 1"]
    first = ["step"] * 3 + checked + ["capture on own", "step", "captured", "replay"]
    assert cuda == [*begin, *first, *end, *begin, "replay", *end, *begin, "step", *end]


def test_what_waits_for_the_host_is_never_captured(cuda: list[str]) -> None:
    def step(x: Tensor) -> tuple[Tensor]:
        if cuda[-1] == "waiting error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return (x + 1,)

    recorder = Recorder(torch.device("cuda"))
    (found,) = Replayed(step, (), recorder)(torch.ones(3))
    assert torch.equal(found, torch.full((3,), 2.0))
    assert recorder.reason == "RuntimeError: called a synchronizing CUDA operation"
    assert not any("capture" in call for call in cuda)
    assert [call for call in cuda if call.startswith("waiting")] == ["waiting error", "waiting 1"]
    assert cuda[-1] == "outside waits for own"


# ---------------------------------------------------------------- the loops
@pytest.fixture(scope="module")
def known() -> nn.Module:
    """Not to be changed by a test: copy it."""
    torch.manual_seed(0)
    return taught(small())


def pair(known: nn.Module, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """(model, suppressed): the second is wrong, but not by much."""
    model, suppressed = (copy.deepcopy(known).to(device) for _ in range(2))
    with torch.no_grad():
        suppressed[9].weight.mul_(-0.5)
    return model, suppressed


def learned(
    known: nn.Module, how: Execution, device: str = "cpu", pictures: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """(masks, order, losses) of 20 steps; batches of 40, 40 and 20."""
    data = quadrants(pictures).on(torch.device(device))
    perturbations = 0.5 * torch.randn(2, 1, 6, 6, generator=seeded()).to(device)
    magnitude = torch.linspace(0.5, 1.5, 16, device=device)
    models = pair(known, device)
    sites = find_sites(models[0], data.images[:2])
    masks, order, trace = learn_masks(
        *models, perturbations, sites, magnitude, data, CONFIG, seeded(), QUIET, how
    )  # fmt: skip
    return masks, order, torch.tensor(trace.loss)


def perturbed(known: nn.Module, how: Execution, device: str = "cpu", batch_statistics: bool = False) -> Tensor:
    """Towards three classes, in batches of 20 and smaller ones."""
    data = quadrants(100).on(torch.device(device))
    suppressed = pair(known, device)[1]
    sites = find_sites(suppressed, data.images[:2])
    options = {"size": 1.5, "steps": 12, "batch_statistics": batch_statistics}
    return perturb(suppressed, [2, 0, 2], sites, data, CONFIG, seeded(), QUIET, how, **options)


def test_masks_of_replayed_steps(known: nn.Module) -> None:
    tape = Tape()
    expected, found = learned(known, Execution()), learned(known, Execution(recorder=tape))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert (tape.recorded, tape.replays, tape.reason) == (1, 14, None)
    assert len(found[0].unique()) > 2


def test_masks_where_nothing_can_be_captured(known: nn.Module) -> None:
    tape = Tape(broken=RuntimeError("no"))
    expected, found = learned(known, Execution()), learned(known, Execution(recorder=tape))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert tape.reason == "RuntimeError: no"


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_perturbations_of_replayed_steps(known: nn.Module, batch_statistics: bool) -> None:
    tape = Tape()
    expected = perturbed(known, Execution(), batch_statistics=batch_statistics)
    found = perturbed(known, Execution(recorder=tape), batch_statistics=batch_statistics)
    assert torch.equal(expected, found)
    assert tape.recorded == 1
    assert 0 < tape.replays < 36  # one capture for all classes, and the last batches eagerly


def test_the_report_says_whether_steps_were_captured(known: nn.Module) -> None:
    run = Run(known, loader(), None, None, 0, False)
    assert run.how.recorder is None
    assert run.report()["cuda_graphs"] is False
    for reason, said in ((None, "captured"), ("RuntimeError: no", "RuntimeError: no")):
        run.how = replace(run.how, recorder=Tape())
        run.how.recorder.reason = reason
        assert run.report()["cuda_graphs"] == said


def loader() -> DataLoader[tuple[Tensor, ...]]:
    data: DefenceSet = quadrants(100)
    return DataLoader(TensorDataset(data.images, data.labels), batch_size=50)


# ---------------------------------------------------------------- on a GPU
def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def ways(known: nn.Module, graph: bool, dtype: torch.dtype | None) -> list[Execution]:
    """[eager, captured] on a GPU."""
    model = pair(known, "cuda")[0]
    images = quadrants().images[:2].cuda()
    captured = capture(model, find_sites(model, images), images) if graph else None
    assert captured is None or captured.reason is None
    return [Execution(captured, dtype, recorder) for recorder in (None, Recorder(torch.device("cuda")))]


@on_a_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("graph", [False, True])
def test_twenty_captured_steps(known: nn.Module, graph: bool, dtype: torch.dtype | None) -> None:
    eager, captured = ways(known, graph, dtype)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        expected, found = learned(known, eager, "cuda"), learned(known, captured, "cuda")
    assert captured.recorder is not None
    assert captured.recorder.reason is None
    assert len(found[0].unique()) > 2
    # The same kernels in the same order, and so mostly the same bits.
    tolerance = 1e-4 if dtype is None else 1e-2
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)


@on_a_gpu
def test_python_runs_while_steps_are_captured_and_for_short_batches_alone(known: nn.Module) -> None:
    counted = copy.deepcopy(known)
    calls: list[int] = []
    counted.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    learned(counted, Execution(recorder=Recorder(torch.device("cuda"))), "cuda")
    # Two models; three to warm up, one to check, one to capture; six of 20 steps have the short batch.
    assert (calls.count(40), calls.count(20)) == (2 * 5, 2 * 6)


@on_a_gpu
@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_captured_perturbations(known: nn.Module, graph: bool, batch_statistics: bool) -> None:
    eager, captured = ways(known, graph, None)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        expected, found = (perturbed(known, how, "cuda", batch_statistics) for how in (eager, captured))
    assert captured.recorder is not None
    assert captured.recorder.reason is None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@on_a_gpu
def test_a_whole_run_and_the_benchmark_capture_their_steps(known: nn.Module) -> None:
    config = PruneConfig(batch_size=40, suppression_stop=0.4, suppression_rate=0.02, perturbations=2, finetune_epochs=1)
    result = mnp_fast.prune(known, loader(), config, device="cuda", progress=False)
    assert result.run["cuda_graphs"] == "captured"
    torch.manual_seed(0)
    work = of_model("SmallNet", randomize_(SmallNet()).eval().cuda(), torch.randn(6, 1, 16, 16).cuda())
    (row,) = step_benchmark.measure(work, torch.float32, ["mnp_fast"], repeats=2)
    assert row["cuda_graph"] == "captured"
    assert row["match"], row
    assert row["peak_mb"] > 0


class Waits(nn.Module):
    """Asks for a number of its input, or for the whole device, on the host."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            torch.cuda.synchronize()
            return x
        return x * float(x.amax() > -1e9)


# Last: a capture that CUDA breaks off (the second) is what may leave torch in disorder.
@on_a_gpu
@pytest.mark.parametrize("whole", [False, True])
def test_a_network_that_waits_for_the_host_runs_eagerly(known: nn.Module, whole: bool) -> None:
    waiting = copy.deepcopy(known)
    waiting[8] = Waits(whole)
    recorder = Recorder(torch.device("cuda"))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        expected = learned(waiting, Execution(), "cuda")
        found = learned(waiting, Execution(recorder=recorder), "cuda")
    assert recorder.reason is not None
    assert whole or "synchronizing" in recorder.reason
    assert "\n" not in recorder.reason
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    # The device is as it was: random numbers (pytorch issue 171263), and another capture.
    if not whole or torch.__version__ >= "2.13":
        with torch.random.fork_rng(devices=[0]):
            assert bool(torch.randn(3, device="cuda").isfinite().all())
    again = learned(known, Execution(recorder=Recorder(torch.device("cuda"))), "cuda")
    torch.testing.assert_close(again[0], learned(known, Execution(), "cuda")[0], rtol=0, atol=1e-4)
