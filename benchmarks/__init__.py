"""Benchmarks: `python -m benchmarks.ops`, `step`, `end_to_end`, `stats`, `zoo`, `demo`; `python -m benchmarks.plot` shows them."""

import os

# Read when torch is loaded: without it the profiler, which measures memory, announces itself on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
