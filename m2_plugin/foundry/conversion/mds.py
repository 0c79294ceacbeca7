"""The modules of Streaming that write and read shards, imported without the rest of Streaming.

This relies on the layout of the package `streaming`, which is private; see also
`m2_plugin/foundry/private.py`. If the layout changes, the whole package is imported instead.
"""

import importlib
import importlib.util
import logging
import sys
import types
from typing import Any

log = logging.getLogger(__name__)


def _import_parts() -> types.SimpleNamespace:
    base = "streaming.base"
    return types.SimpleNamespace(
        MDSWriter=importlib.import_module(f"{base}.format.mds.writer").MDSWriter,
        MDSReader=importlib.import_module(f"{base}.format.mds.reader").MDSReader,
        get_hash=importlib.import_module(f"{base}.hashing").get_hash,
        decompress=importlib.import_module(f"{base}.compression").decompress,
        is_compression=importlib.import_module(f"{base}.compression").is_compression,
    )


def _bare_package(name: str, path: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [path]
    return module


def _import_parts_alone() -> types.SimpleNamespace:
    """Import the modules below empty packages named `streaming`, then remove these packages.

    The `__init__` of `streaming` imports torchvision, scikit-learn and transformers for other data
    sets: 15 s and 0.8 GB, against 3 s and 0.4 GB for these modules. A later `import streaming` runs
    its `__init__` and finds the modules loaded.
    """
    spec = importlib.util.find_spec("streaming")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("mosaicml-streaming is not installed")
    root = list(spec.submodule_search_locations)[0]
    try:
        sys.modules["streaming"] = _bare_package("streaming", root)
        sys.modules["streaming.base"] = _bare_package("streaming.base", f"{root}/base")
        return _import_parts()
    finally:
        for name in ("streaming", "streaming.base"):
            sys.modules.pop(name, None)


_parts: list[Any] = []


def mds(alone: bool = False) -> Any:
    """Return `MDSWriter`, `MDSReader`, `get_hash` and `decompress` of `streaming`.

    Args:
        alone: Whether to skip the rest of `streaming`, in a process that needs nothing else of it.
            Later calls ignore this argument.
    """
    if not _parts:
        _parts.append(_import_quickly() if alone else _import_parts())
    return _parts[0]


def _import_quickly() -> types.SimpleNamespace:
    if "streaming" in sys.modules:
        return _import_parts()
    try:
        return _import_parts_alone()
    except Exception as error:  # the package has another layout: import all of it, slowly
        log.debug("importing the whole of streaming: %r", error)
        return _import_parts()
