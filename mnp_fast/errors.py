"""Every error that mnp_fast raises on purpose: one family, each message naming cause and remedy."""

from __future__ import annotations


class MnpFastError(Exception):
    """Base of all errors of this package."""


class DataError(MnpFastError, ValueError):
    """The defence set cannot be used: empty, one-pass, wrong labels, shapes or values."""


class ModelError(MnpFastError, ValueError):
    """The model cannot be used: no prunable site, weights not finite, output not logits, fewer than two classes."""


class ConfigError(MnpFastError, ValueError):
    """A field of PruneConfig or an option is out of its range."""


class FileError(MnpFastError, OSError):
    """A file or directory cannot be read, trusted or written: truncated, hostile, does not fit, read-only."""


class BackendError(MnpFastError, RuntimeError):
    """A kernel backend was forced that cannot run here, or a kernel got tensors that it cannot take."""
