"""Keeps out of the supervisor's memory what its libraries import and it never uses.

paho-mqtt imports urllib.request for proxies of web sockets, dataclasses import inspect for classes without a docstring,
the store imports tarfile for assets that the courier unpacks, msgspec prefers typing_extensions where something else installed it: 3 MB for nothing. A deferred module is imported by
the first use of one of its names, so nothing that works elsewhere fails here. Only for a process of our own, and before
anything else is imported: never in an application's.
"""

from __future__ import annotations

import importlib
import sys
import types

DEFERRED = ("urllib.request", "inspect", "difflib", "tarfile", "shutil", "tempfile", "traceback")
"""Imported when a name of theirs is used first."""
BLOCKED = ("typing_extensions",)
"""Not needed where typing itself has everything; its importers look there next."""


class _Later(types.ModuleType):
    """Stands for a module until it is used."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system looks; that is no use
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def keep_out() -> None:
    """Defer and block; what is imported already stays."""
    for name in DEFERRED:
        if name in sys.modules:
            continue
        later = _Later(name)
        sys.modules[name] = later
        package, _, last = name.rpartition(".")
        if package:
            setattr(importlib.import_module(package), last, later)
    for name in BLOCKED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the documented way to make an import fail


def deferred() -> list[str]:
    """Return the modules that nobody used so far."""
    return [name for name in DEFERRED if isinstance(sys.modules.get(name), _Later)]
