"""Steps of static shapes as CUDA graphs: captured once, replayed for every batch of the same shape.

Python launches the kernels of a step one by one, hundreds of them; a graph launches them all in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
Step = Callable[..., Results]

_WARM_UP = 3


class Recorder:
    """Captures the steps of a run on a CUDA device, until one cannot be captured: then all others run eagerly.

    reason: why, in one line; None where nothing has failed. As for every capture, no other thread may use a GPU
    meanwhile: it could spoil the capture, and fail itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = None
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside runs on one stream of its own, after all that was given before and before all that follows.

        Eager steps too: the node of the mask's gradient outlives a step, and stays on the stream where it was made.
        """
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def record(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """Run ``run`` a few times, then capture it. Returns (replay, results): tensors that every replay overwrites."""
        for _ in range(_WARM_UP):
            run()
        # A capture that CUDA itself breaks off can leave torch's random state and memory pools broken: what waits for
        # the host, the usual reason, is refused here, where it does no harm.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            results = run()
        return graph.replay, results


class Replayed:
    """``step`` as a function that is captured at its first call and replayed wherever the shapes are those of then.

    step: takes tensors, any shape and dtype, on the recorder's device, and returns a tuple of detached ones; it may
    change what it is given. A replay runs no Python: whatever is no tensor must be the same in every call, and random
    numbers of the CPU are to be drawn outside. All else that it reads (weights, what `masked` has folded) must stay
    where it is: call this only inside the `masked` of its models.
    state: the tensors that it changes in place from call to call; a call counts as one step, the first one too.
    recorder: None: every call is one of ``step`` itself. Results are the caller's to keep.
    """

    def __init__(self, step: Step, state: Sequence[Tensor], recorder: Recorder | None) -> None:
        self._step, self._state, self._recorder = step, state, recorder
        self._inputs: list[Tensor] = []
        self._results: Results = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> Results:
        if self._recorder is None:
            return self._step(*inputs)
        with self._recorder.beside():
            if self._replay is None and self._recorder.reason is None:
                self._capture(self._recorder, inputs)
            if self._replay is None or _shapes(inputs) != _shapes(self._inputs):
                return self._step(*inputs)
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
            self._replay()
            # The next replay writes over them.
            return tuple(result.clone() for result in self._results)

    def _capture(self, recorder: Recorder, inputs: Sequence[Tensor]) -> None:
        self._inputs = [given.clone() for given in inputs]
        before = [tensor.detach().clone() for tensor in self._state]
        try:
            self._replay, self._results = recorder.record(partial(self._step, *self._inputs))
        except Exception as error:  # whatever a stranger's forward does
            recorder.reason = _told(error)
            self._inputs = []
        finally:
            with torch.no_grad():
                for tensor, value in zip(self._state, before, strict=True):
                    tensor.copy_(value)


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _told(error: Exception) -> str:
    """The error in one line."""
    # The end of a broken capture raises once more, over the error that says why.
    cause = error.__context__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:200] if lines else ''}"
