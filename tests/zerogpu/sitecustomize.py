"""Makes `python app.py` find a ZeroGPU: put on PYTHONPATH, it prepares the real `spaces` package as
it is imported, for a machine without a GPU. Nothing of the app is changed.

ZEROGPU_EMULATED=cpu: the package has no torch to hook, and workers compute on the CPU.
ZEROGPU_EMULATED=hooks: it hooks torch as on the platform, as if this build of torch knew CUDA; the
parent then loads and packs as there, but no worker can start.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Emulation(MetaPathFinder):
    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._finding = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ("spaces.zero.torch", "spaces.zero.utils") or self._finding:
            return None
        self._finding = True
        spec = importlib.util.find_spec(name)
        self._finding = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            prepared = self._hooks if name.endswith("torch") else self._without_driver
            spec.loader.exec_module = lambda module: prepared(execute, module)  # type: ignore[method-assign]
        return spec

    def _hooks(self, execute: Any, module: ModuleType) -> None:
        if self._kind == "cpu":
            assert "torch" not in sys.modules, "spaces has to come before torch"
            sys.modules["torch"] = None  # type: ignore[assignment]
            execute(module)
            del sys.modules["torch"]
            return
        import torch

        torch.version.cuda = "12.8"
        torch.cuda._is_in_bad_fork = torch.cuda.is_initialized  # the CPU build's cannot be pickled
        for owner, missing in (
            (torch._C, "_cuda_init"),
            (torch.cuda, "_exchange_device"),
            (torch.cuda, "_maybe_exchange_device"),
        ):
            setattr(owner, missing, torch.cuda.synchronize)
        execute(module)

    def _without_driver(self, execute: Any, module: ModuleType) -> None:
        execute(module)
        module.self_cgroup_device_path = lambda: "/"  # type: ignore[attr-defined]


if os.environ.get("ZEROGPU_EMULATED"):
    sys.meta_path.insert(0, Emulation(os.environ["ZEROGPU_EMULATED"]))
