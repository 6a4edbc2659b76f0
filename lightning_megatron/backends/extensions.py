"""Which parts of TransformerEngine and Apex run, where they are installed, and why others do not.

The package's fused blocks come first, since they are faster. What remains are layers that run unfused (experts, norms
after each block, ``fused=False``, LoRA, no Triton): there megatron-core's linears and torch's norms are replaced. An
extension that is missing, broken or another package of that name is never an error.

Importing this module imports none of them. Each is looked at once, when a model is built or a report is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cuda",)
"""Where extensions run: all of their kernels are for CUDA."""


@dataclass(frozen=True, slots=True)
class Extension:
    """A part of TransformerEngine or Apex that this package can run."""

    package: str
    """Its name in words."""
    part: str
    """What it runs."""
    module: str
    """Has to be importable."""
    names: tuple[str, ...]
    """Which that module has to have."""
    taken_up: tuple[str, str]
    """The module of megatron-core that imports it, and the flag by which that module tells whether it could."""


TRANSFORMER_ENGINE_NORMS = Extension(
    "TransformerEngine",
    "LayerNorm and RMSNorm",
    "transformer_engine.pytorch",
    ("LayerNorm", "RMSNorm"),
    ("megatron.core.extensions.transformer_engine", "HAVE_TE"),
)
APEX_NORM = Extension(
    "Apex",
    "LayerNorm",
    "apex.normalization.fused_layer_norm",
    ("FusedLayerNormAffineFunction",),
    ("megatron.core.fusions.fused_layer_norm", "HAVE_FUSED_LAYER_NORM"),
)
APEX_WEIGHT_GRADIENTS = Extension(
    "Apex",
    "weight gradients",
    "fused_weight_gradient_mlp_cuda",  # Apex installs it beside itself
    ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"),
    ("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available"),
)

EXTENSIONS = (TRANSFORMER_ENGINE_NORMS, APEX_NORM, APEX_WEIGHT_GRADIENTS)

_IMPORTED_BY_MEGATRON_CORE = (
    "transformer_engine.pytorch",
    "apex",
    "apex.normalization.fused_layer_norm",
    "apex.optimizers",
    "apex.multi_tensor_apply",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
)
_broken: dict[str, str] = {}
"""Packages whose import fails otherwise than with an ``ImportError``, and how."""


def unavailable(extension: Extension, device_type: str) -> str | None:
    """Why ``extension`` does not run on devices of this type, in words; ``None`` if it does.

    A package that is installed but cannot be imported is told in a warning, once.
    """
    top = _top(extension.module)
    if top in _broken:
        return f"broken: {_broken[top]}"
    if not _installed(top):
        return "not installed"
    if top == "apex" and another_apex():
        return "another package named apex is installed, not NVIDIA's"
    if device_type not in DEVICE_TYPES:
        return "there is no GPU"
    return _defect(extension)


def another_apex() -> bool:
    """Whether a package named ``apex`` is installed that is not NVIDIA's. The one on PyPI is a web framework."""
    if "apex.normalization" in sys.modules or not _installed("apex"):
        return False
    # Not find_spec("apex.normalization"), which imports the package, and the one on PyPI fails at that.
    spec = importlib.util.find_spec("apex")
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    return not any((Path(place) / "normalization").is_dir() for place in places)


def keep_out_broken() -> None:
    """Make packages look absent to megatron-core that it could not be imported with.

    megatron-core does without those whose import raises an ``ImportError``. A broken build may raise anything else, an
    ``OSError`` for a library that it does not find, for instance, and that would be raised to whoever imports
    megatron-core. It imports the same packages, so trying them here first costs nothing.
    """
    for module in _IMPORTED_BY_MEGATRON_CORE:
        top = _top(module)
        if top in _broken or not _installed(top):
            continue
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        except Exception as error:
            _broken[top] = _words(error)
            sys.modules[top] = None  # type: ignore[assignment]  # how Python spells "cannot be imported"
            logger.warning("%s is installed, but is not used: %s", top, _broken[top])


@functools.cache
def _defect(extension: Extension) -> str | None:
    """What is wrong with an extension that is installed; ``None`` if it works."""
    reason = _import_failure(extension)
    if reason is not None:
        logger.warning("%s's %s not used: %s", extension.package, extension.part, reason)
    return reason


def _import_failure(extension: Extension) -> str | None:
    importlib.import_module("torch")  # whose libraries compiled extensions are linked with
    try:
        module = importlib.import_module(extension.module)
    except Exception as error:  # any: a broken build may raise what it likes
        return f"broken: {_words(error)}"
    missing = [name for name in extension.names if not hasattr(module, name)]
    if missing:
        return f"{extension.module} has no {', '.join(missing)}: another version is needed"
    where, flag = extension.taken_up
    if not getattr(importlib.import_module(where), flag):
        return f"it can be imported, but {where} could not"
    return None


def _installed(top: str) -> bool:
    if top in sys.modules:
        return sys.modules[top] is not None
    return importlib.util.find_spec(top) is not None


def _top(module: str) -> str:
    return module.partition(".")[0]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
