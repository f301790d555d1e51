"""Measurements, each run by `python -m benchmarks.NAME`; `python -m benchmarks.plot` shows the results."""

import os

# Read when torch is loaded: without it the profiler, which measures memory, announces itself on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
