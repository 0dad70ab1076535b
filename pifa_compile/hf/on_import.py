"""Registration with transformers at the moment its list of quantization methods is imported, and not before.

transformers looks methods up in two dictionaries of ``transformers.quantizers.auto`` and has no entry points for them.
To import it takes seconds, so ``import pifa_compile`` does not: it leaves a finder for this one module, which loads it
as it would have been loaded, registers, and is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers has its list of methods, else as soon as it has."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import what registers itself; where its own import has brought us here, it does so at its end."""
    import_module("pifa_compile.hf.quantizer")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that other finders have for the target; it registers once it has been executed."""
        if fullname != TARGET:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, which has its place again afterwards; then register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
