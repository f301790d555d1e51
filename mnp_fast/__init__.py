"""mnp_fast: find and prune the backdoor of an image classifier from a few hundred clean pictures."""

__version__ = "0.1.0"

from mnp_fast.config import PruneConfig
from mnp_fast.errors import BackendError, ConfigError, DataError, FileError, MnpFastError, ModelError
from mnp_fast.prune import prune, scan
from mnp_fast.result import PruneResult, ScanResult

__all__ = [
    "BackendError",
    "ConfigError",
    "DataError",
    "FileError",
    "MnpFastError",
    "ModelError",
    "PruneConfig",
    "PruneResult",
    "ScanResult",
    "prune",
    "scan",
]
