"""Not in the wheel: lets a checkout import its folders by the names they have there.

``strategies/``, ``clients/`` and ``simulations/`` stand beside this package in a checkout, where
``flwr run`` names them so, and inside it in the wheel. Here ``fl_bgmd.simulations.config`` is
another name of ``simulations.config``: the same module, so that there is one of every class,
registry and cache, and what is pickled by one name is found by the other.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_PREFIX = "fl_bgmd."


def alias(name: str) -> None:
    """Make ``fl_bgmd.FOLDER``, while it is imported, the package ``FOLDER`` itself."""
    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Submodules())  # ahead of the one that would load a second copy
    _replace(sys.modules[name])


def _replace(module: ModuleType) -> None:
    """Put the real module in the place of ``module``, which stands for it under another name.

    A second thread that imports the same name meanwhile waits, but for the object it saw first:
    so ``module`` must answer too.
    """
    name = module.__name__
    real = importlib.import_module(name.removeprefix(_PREFIX))
    module.__dict__["__getattr__"] = partial(getattr, real)
    sys.modules[name] = real


class _Submodules(MetaPathFinder, Loader):
    """Finds ``fl_bgmd.FOLDER.module`` in the module ``FOLDER.module``."""

    _folders = ("strategies", "clients", "simulations")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for modules of the folders, None for all others."""
        there = name.removeprefix(_PREFIX)
        if there == name or "." not in there or there.partition(".")[0] not in self._folders:
            return None
        return None if find_spec(there) is None else ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        """Import the real module and put it in the place of the empty ``module``."""
        _replace(module)
