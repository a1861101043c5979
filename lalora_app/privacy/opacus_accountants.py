"""Opacus' accountants, without its optimisers if torch is not imported.

The package `opacus` imports torch and its distributed parts, which takes several seconds. Its
accountants use numpy and scipy only: of the rest they name one class, in a type annotation. So in a
process without torch (a message that is refused, the command ``lalora ledger``) their own modules
are imported alone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

_PACKAGE, _OPTIMIZERS = "opacus", "opacus.optimizers"


def _empty_package() -> ModuleType:
    """Return a package without content whose submodules are those of Opacus."""
    spec = PathFinder.find_spec(_PACKAGE)
    package = ModuleType(_PACKAGE)
    package.__path__ = list((spec and spec.submodule_search_locations) or ())
    return package


@contextmanager
def _only_submodules() -> Iterator[None]:
    """Let submodules of Opacus be imported without the package; afterwards none is known."""
    optimizers: Any = ModuleType(_OPTIMIZERS)
    optimizers.DPOptimizer = object
    sys.modules |= {_PACKAGE: _empty_package(), _OPTIMIZERS: optimizers}
    try:
        yield
    finally:
        # A later import of Opacus, with torch, must get the whole package.
        for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
            del sys.modules[name]


@lru_cache(maxsize=1)
def accountants() -> tuple[Any, Any]:
    """Return Opacus' classes ``PRVAccountant`` and ``RDPAccountant``."""
    if "torch" not in sys.modules:
        with _only_submodules():
            from opacus.accountants import PRVAccountant, RDPAccountant
        return PRVAccountant, RDPAccountant
    from opacus.accountants import PRVAccountant, RDPAccountant

    return PRVAccountant, RDPAccountant
