"""megatron-core's compiled index builders, without importing megatron-core.

``import megatron.core.datasets.helpers_cpp`` runs ``megatron.core.__init__`` first, which takes seconds and prints
warnings. The compiled file needs none of it, so it is loaded by its path.
"""

import importlib.machinery
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

from lightning_megatron.errors import DataError


@cache
def helpers() -> ModuleType:
    """The `helpers_cpp` extension of the installed megatron-core.

    Raises:
        DataError: megatron-core is not installed, or was built without the extension for this Python.
    """
    namespace = importlib.util.find_spec("megatron")
    locations = list(namespace.submodule_search_locations or ()) if namespace else []
    for location in locations:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(location, "core", "datasets", f"helpers_cpp{suffix}")
            if path.is_file():
                spec = importlib.util.spec_from_file_location("helpers_cpp", path)
                if spec is None or spec.loader is None:
                    continue
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    raise DataError(
        f"megatron-core's compiled dataset helpers (core/datasets/helpers_cpp) were not found in {locations}. "
        "Install a megatron-core wheel for this Python: pip install 'megatron-core>=0.19.2,<0.20'."
    )
