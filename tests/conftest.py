"""Lets torchvision, whose wheel wants CUDA libraries, be imported beside a CPU-only torch."""

from __future__ import annotations

import sys

import torch

_library: torch.library.Library | None = None  # an operator lives as long as its library


def _import_torchvision() -> None:
    global _library
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist: the models that are tested do not call it
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    except ImportError:
        pass


_import_torchvision()
