"""Measurements, each run by `python -m benchmarks.NAME`; `python -m benchmarks.plot` shows the results."""

import os

# Read when torch is loaded: without it the profiler, which measures memory, announces itself on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# The time of compiling is that of a first run, not of a look into a cache on disk.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
