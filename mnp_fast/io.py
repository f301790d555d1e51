"""Files: weights read without unpickling code, results written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnp_fast.errors import FileError

SCHEMA_VERSION = 3
REPORT = "report.json"
_VALUES = "values"
_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# DataParallel, torch.compile, and a training module that holds the network as `model`.
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file: tensors on the CPU by name.

    .safetensors, or .pth, .pt, .bin, .ckpt, .tar through torch.load(weights_only=True), which runs no code of the
    pickle. A checkpoint that holds the state dict under `state_dict`, `model`, `net` and the like is unwrapped.
    FileError for a file that is missing, a directory, truncated, holds code, or is no state dict.
    """
    file = Path(path)
    if file.is_dir():
        raise FileError(f"{file} is a directory; name the weights file in it")
    if not file.is_file():
        raise FileError(f"{file} does not exist; check the path of the weights")
    if file.suffix == ".safetensors":
        content = _read_safetensors(file)
    elif file.suffix in _PICKLED:
        content = _read_pickle(file)
    else:
        known = ", ".join((".safetensors", *_PICKLED))
        raise FileError(
            f"{file} ends in {file.suffix or 'no suffix'}; weights are read from {known}: convert or rename it"
        )
    return _state_dict(content, file)


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load `weights` into `model` in place, every name and shape fitting exactly.

    A prefix that all names share and the model does not have ("module.", "_orig_mod.", "model.") is taken off.
    Missing `num_batches_tracked` counters, which old files lack, keep the model's value. FileError, with the model
    unchanged, where names are missing or unknown or shapes differ.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    weights = strip_prefix(weights, own)
    weights = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | weights
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    differing = [
        f"{name} is {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", differing))
        if names
    ]
    if problems:
        raise FileError(
            f"the weights do not fit the model: {'; '.join(problems)}; "
            "give the architecture, and the number of classes, that they were trained with"
        )
    before = {name: value.clone() for name, value in own.items()}
    try:
        model.load_state_dict(weights, strict=False)
    except Exception as error:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(before[name])
        raise FileError(f"the model refused the weights ({error}); give weights of this architecture") from error


def strip_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """`weights` without the wrapper prefixes that all their names share and the names of `own` do not."""
    stripped = dict(weights)
    found = True
    while found and stripped:
        found = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in stripped) and not all(name.startswith(prefix) for name in own):
                stripped = {name[len(prefix) :]: value for name, value in stripped.items()}
                found = True
    return stripped


def check_writable(directory: str | os.PathLike[str]) -> None:
    """FileError where `directory` cannot be made or written to; leaves nothing behind. For before the long work."""
    folder = Path(directory)
    with _writing(folder):
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for part in made:
                with contextlib.suppress(OSError):
                    part.rmdir()


def save_files(
    directory: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    report: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write NAME.safetensors for each entry of `tensors`, the files of `texts`, and report.json, all or none.

    tensors: {"model": {parameter: tensor}, ...}; any device and layout, tied ones are written apart. texts: file name
    to content. report: JSON values; NaN and Inf become null, and "schema_version" is added.
    Everything is written to a temporary folder beside its place and then renamed, the report last. Where any step
    fails, the files that stood there before are put back. FileError where the directory cannot be written to.
    """
    folder = Path(directory)
    content = to_json({"schema_version": SCHEMA_VERSION, **report})
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".mnp_fast-", dir=folder))
        try:
            names = []
            for name, state in tensors.items():
                names.append(f"{name}.safetensors")
                save_file({key: _plain(value) for key, value in state.items()}, work / names[-1], {"format": "pt"})
            for name, text in (*(texts or {}).items(), (REPORT, content)):
                names.append(name)
                (work / name).write_text(text, encoding="utf-8")
            for name in names:
                # safetensors makes its files readable to their owner alone, whatever the umask says.
                shutil.copymode(work / REPORT, work / name)
                _flush(work / name)
            with _alone(folder):
                _place(work, folder, names)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, not copied; extra state of modules that is none is left out."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def save_state(file: str | os.PathLike[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors by name and JSON values into one .safetensors file, whole or not at all; its folder is made.

    tensors: any device and layout. FileError where it cannot be written.
    """
    path = Path(file)
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".mnp_fast-", dir=path.parent)) / path.name
        try:
            plain = {name: _plain(tensor) for name, tensor in tensors.items()}
            save_file(plain, work, {"format": "pt", _VALUES: to_json(values, indent=None)})
            _flush(work)
            os.replace(work, path)
        finally:
            shutil.rmtree(work.parent, ignore_errors=True)


def read_state(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and values of a file of `save_state`. FileError where it is damaged or is none."""
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            values = json.loads((content.metadata() or {})[_VALUES])
            return {name: content.get_tensor(name) for name in content.keys()}, values  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FileError(f"{file} is damaged, or not of mnp_fast ({_first_line(error)}); delete it") from error


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report.json of a saved result. FileError where there is none, or it is not one this version can read."""
    file = Path(directory) / REPORT
    try:
        report = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(f"{directory} has no {REPORT}; name a directory that a result was saved to") from error
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise FileError(f"{file} is damaged: not strict JSON ({error}); run again and save anew") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise FileError(
            f"{file} has schema version {version}, this mnp_fast reads {SCHEMA_VERSION}; "
            "use the mnp_fast that wrote it, or run again"
        )
    return report


def to_json(value: Any, indent: int | None = 2) -> str:
    """Strict JSON of `value`: NaN and Inf as null, tuples as lists, one-element tensors as numbers, paths as text."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file, device="cpu")
    except SafetensorError as error:
        raise FileError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error}); check its permissions") from error


def _read_pickle(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Its advice on pickle protocols is for developers; a file that cannot be read raises all the same.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found or "Unsupported" in str(error):
            raise FileError(
                f"{file} holds Python code or objects ({found[1] if found else 'unknown'}), which could run anything "
                "on this machine, and is not opened; get a file of tensors only, such as .safetensors or "
                "torch.save(model.state_dict(), ...)"
            ) from error
        raise FileError(
            f"{file} is truncated or no file of torch.save ({_first_line(error)}); fetch it again"
        ) from error
    except PermissionError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:
        # torch.load answers a damaged file with many types: RuntimeError, EOFError, ValueError, KeyError, struct.error.
        raise FileError(
            f"{file} is truncated, or no state dict written by torch.save ({_first_line(error)}); "
            "fetch it again, or save model.state_dict() anew"
        ) from error


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    for _ in range(3):
        inner = next((content[k] for k in _WRAPPERS if k in content), None) if isinstance(content, Mapping) else None
        if not isinstance(inner, Mapping):
            break
        content = inner
    if not isinstance(content, Mapping):
        raise FileError(f"{file} holds a {type(content).__name__}, not a state dict; save model.state_dict() alone")
    if not content:
        raise FileError(f"{file} holds no tensors; save model.state_dict() anew")
    odd = [f"{key!r} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if odd or not all(isinstance(key, str) for key in content):
        raise FileError(
            f"{file} is not a state dict: it holds {', '.join(odd[:3]) or 'names that are not text'}; "
            "save model.state_dict() alone"
        )
    return {name: value.detach() for name, value in content.items()}


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise FileError(
            f"{folder} cannot be written to ({cause}); name a directory with room that you may write to"
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other run puts its files into the folder; on a file system without locks it does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # the lock goes with it, also in a crash


def _place(work: Path, folder: Path, names: list[str]) -> None:
    """Rename the files of `work` into `folder`; on failure put back those that were there."""
    kept: list[str] = []
    placed: list[str] = []
    # The old report goes first and the new one comes last: at no moment does a report stand beside another run's files.
    try:
        for name in reversed(names):
            if (folder / name).exists():
                os.replace(folder / name, work / f"old-{name}")
                kept.append(name)
        for name in names:
            os.replace(work / name, folder / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (folder / name).unlink(missing_ok=True)
        for name in kept:
            os.replace(work / f"old-{name}", folder / name)
        raise


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy that shares memory with nothing, as safetensors demands."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and not isinstance(value, (int, float)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def _first_line(error: Exception) -> str:
    first = re.split(r"\. |\n", str(error).strip())[0]
    return f"{type(error).__name__}: {first[:200]}"
