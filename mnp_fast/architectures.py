"""Networks by name: torchvision, timm, or a factory of the caller's own. Nothing is ever downloaded."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mnp_fast.errors import ConfigError, ModelError
from mnp_fast.io import fit_weights, strip_prefix

_TRANSFORMING = ("googlenet", "inception_v3")
"""torchvision's own weights of these, and what was trained from them, want pictures rescaled inside."""
FORMS = "torchvision/NAME, timm/NAME or module.path:factory"


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects: square pictures of `size` pixels, scaled to [0, 1], less `mean`, over `std`, per channel.

    None: pictures are taken as they are. margin: the shorter side is resized to this many times `size`, of which the
    middle is taken. cubic: by bicubic interpolation, else bilinear.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    margin: float = 1.0
    cubic: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"the size of pictures is {self.size}; it must be at least 1")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError(f"the standard deviations are {self.std}; each must be above 0")


def build(spec: str, num_classes: int | None = None) -> nn.Module:
    """A network with fresh weights: "torchvision/NAME", "timm/NAME" or "module.path:factory" (found from here, too).

    num_classes: None for the architecture's own. A factory is called with num_classes=... where it is given.
    ConfigError for an unknown name, a missing package, or a factory that cannot be called.
    """
    if num_classes is not None and num_classes < 2:
        raise ConfigError(f"{num_classes} classes were asked for; a classifier needs at least 2")
    source, slash, name = spec.partition("/")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if slash and source == "torchvision":
        models = _torchvision_models()
        known = models.list_models(module=models)
        if name not in known:
            raise _unknown(spec, source, name, known)
        if name in _TRANSFORMING:
            # Their own way to draw fresh weights takes seconds, and weights are loaded next.
            options |= {"transform_input": True, "init_weights": False}
        return models.get_model(name, weights=None, **options)
    if slash and source == "timm":
        timm = _timm()
        # A name with a colon would have timm fetch a configuration from a hub.
        if ":" in name or not timm.is_model(name):
            raise _unknown(spec, source, name, timm.list_models())
        return timm.create_model(name, pretrained=False, **options)
    if ":" in spec and not slash:
        return _from_factory(spec, options)
    raise ConfigError(f"the architecture {spec!r} is in no known form; give {FORMS}")


def build_with_weights(spec: str, weights: Mapping[str, Tensor], num_classes: int | None = None) -> nn.Module:
    """The network `spec` with `weights` loaded into it.

    Where num_classes is None and the architecture's own number does not fit, the number is read off the weights: the
    rows of those tensors, the classifier's, that differ from the model's in nothing else.
    ConfigError as in `build`; FileError where the weights do not fit.
    """
    model = build(spec, num_classes)
    found = None if num_classes is not None else _classes_in(strip_prefix(weights, model.state_dict()), model)
    if found is not None:
        model = build(spec, found)
    fit_weights(model, weights)
    return model


def preprocessing(spec: str, model: nn.Module) -> Preprocessing:
    """The usual preprocessing of a network that `build` made of `spec`; empty for a factory's."""
    source, _, name = spec.partition("/")
    if source == "timm":
        config = _timm().data.resolve_model_data_config(model)
        cubic = config["interpolation"] == "bicubic"
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return Preprocessing(config["input_size"][-1], mean, std, 1 / config["crop_pct"], cubic)
    if source == "torchvision":
        usual = _torchvision_models().get_model_weights(name).DEFAULT.transforms()
        margin, cubic = usual.resize_size[0] / usual.crop_size[0], usual.interpolation.value == "bicubic"
        return Preprocessing(usual.crop_size[0], tuple(usual.mean), tuple(usual.std), margin, cubic)
    return Preprocessing()


def _torchvision_models() -> Any:
    try:
        return import_torchvision("torchvision.models")
    except ImportError as error:
        raise ConfigError("torchvision/... needs the package torchvision; pip install torchvision") from error


def _timm() -> Any:
    try:
        import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError("timm/... needs the packages timm and torchvision; pip install timm torchvision") from error


def import_torchvision(name: str = "torchvision") -> ModuleType:
    """torchvision or a module of it, also where its wheel was built for another torch; ImportError without it."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # A torchvision built for another torch (a CUDA one beside a CPU-only torch) cannot load its own operators and stops
    # at their names. Classifiers need none of them: with the names declared, all else imports.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module(name)


# A Library takes its definitions back when it is collected.
_kept: list[torch.library.Library] = []


def _from_factory(spec: str, options: dict[str, Any]) -> nn.Module:
    path, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(path), name)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the module {path!r} of {spec!r} cannot be imported ({error}); "
            f"give a module that is installed or stands in {here}"
        ) from error
    except AttributeError as error:
        near = _near(name, vars(sys.modules[path]))
        raise ConfigError(f"the module {path} has no {name!r}{near}; give {FORMS}") from error
    if not callable(factory):
        raise ConfigError(f"{spec!r} is a {type(factory).__name__}, not a function that makes the network")
    try:
        inspect.signature(factory).bind(**options)
    except (TypeError, ValueError) as error:
        called = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ConfigError(
            f"the factory {spec!r} cannot be called as {name}({called}) ({error}); "
            "give one that needs nothing, and takes num_classes where a number of classes is given"
        ) from error
    try:
        model = factory(**options)
    except Exception as error:
        raise ConfigError(f"the factory {spec!r} failed ({type(error).__name__}: {error}); mend it") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec!r} made a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _classes_in(weights: Mapping[str, Tensor], model: nn.Module) -> int | None:
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    differing = [name for name, value in own.items() if name in weights and weights[name].shape != value.shape]
    rows = {weights[name].shape[0] for name in differing if weights[name].shape[1:] == own[name].shape[1:]}
    same_but_rows = all(weights[name].ndim and weights[name].shape[1:] == own[name].shape[1:] for name in differing)
    return rows.pop() if same_but_rows and len(rows) == 1 else None


def _unknown(spec: str, package: str, name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"the architecture {spec!r} is unknown: {package} has no model {name!r}{_near(name, known)}")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
