"""After ``import flute``, transformers knows FLUTE checkpoints, yet is not imported for it.

transformers has no entry points for quantisation methods. So `install` registers at once if its
registry is loaded, and else waits: a finder on ``sys.meta_path`` sees the registry's import and
registers when that has run. Nothing here may fail another package's import: what goes wrong is a
warning.

Without registration, transformers loads a FLUTE checkpoint as random weights and only warns.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers, now or when it is imported; calling it again changes nothing."""
    _warn_of_original()
    if hasattr(sys.modules.get(_REGISTRY), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Lets the other finders find the registry, and adds a step to its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # uncovers the method
            execute(module)
            # A new list: removing in place would make another thread's import skip a finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            _register()

        try:
            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        except AttributeError as error:  # a loader without a __dict__
            _warn_of_failure(error)
        return spec


def _register() -> None:
    try:
        importlib.import_module("flute.integrations.huggingface_quantizer")  # registers
    except Exception as error:  # noqa: BLE001 (it must not break the import under way)
        _warn_of_failure(error)


def _warn_of_failure(error: Exception) -> None:
    warnings.warn(
        "FLUTE could not register with transformers, which would load FLUTE checkpoints as random "
        f"weights: {type(error).__name__}: {error}. FLUTE needs transformers >= 5.16.",
        stacklevel=2,
    )


def _warn_of_original() -> None:
    try:
        version = importlib.metadata.version("flute-kernel")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"The original FLUTE (flute-kernel {version}) is installed too, in the same folder "
        "`flute`, so files of both may be mixed. Run `pip uninstall flute-kernel`, then install "
        "this package again.",
        stacklevel=3,
    )
