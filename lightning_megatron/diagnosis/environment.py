"""Python, packages, devices, memory, files and network of this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from lightning_megatron.backends.extensions import another_apex
from lightning_megatron.diagnosis.finding import Finding, note, ok, problem

_GIB = 2**30
_MALICIOUS = ("2.6.2", "2.6.3")
_OPTIONAL = {"tensorboard": "TensorBoard logs", "pyarrow": "Parquet files", "datasets": "Hugging Face datasets"}
# Without the package's own metadata, as in a source tree that was never installed.
_REQUIRED = ("torch>=2.9", "lightning>=2.6.4", "megatron-core>=0.19.2,<0.20", "transformers>=5,<6", "hydra-core>=1.3")


def environment() -> list[Finding]:
    """Everything but kernels and the self-test."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _extensions, _devices, _host, _network)
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    yield ok("python", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


# ---------------------------------------------------------------------------------------------------------- packages


def _packages() -> Iterator[Finding]:
    try:
        names = [text for text in requires("lightning-megatron") or () if "extra ==" not in text]
        yield ok("lightning-megatron", version("lightning-megatron"))
    except PackageNotFoundError:
        names = list(_REQUIRED)
        yield note("lightning-megatron", "imported from a source tree that is not installed", "pip install -e .")
    for text in names:
        yield requirement(text)
    for package, what in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield note(package, f"not installed; it is for {what}", f"pip install {package}")


def requirement(text: str) -> Finding:
    """Whether a requirement such as ``"torch>=2.9"`` is met."""
    wanted = Requirement(text)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return problem(wanted.name, "not installed", f"pip install '{wanted}'")
    if wanted.name == "lightning" and found in _MALICIOUS:
        return problem(
            wanted.name,
            f"{found} is a malicious upload (GHSA-w37p-236h-pfx3)",
            "Take this machine off the network, change the secrets that it knows, and pip install 'lightning>=2.6.4'.",
        )
    if not wanted.specifier.contains(Version(found), prereleases=True):
        return problem(wanted.name, f"{found}, but {wanted.specifier} is needed", f"pip install '{wanted}'")
    return ok(wanted.name, found)


def _extensions() -> Iterator[Finding]:
    """TransformerEngine and Apex are not needed, and a broken one is not used; its owner may want to know."""
    if another_apex():
        yield note("apex", "this is not NVIDIA's Apex, but an unrelated package", "pip uninstall apex")
    if importlib.util.find_spec("transformer_engine") is not None:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except Exception as error:  # any: a shared library that is missing raises OSError, others their own
            yield problem(
                "transformer-engine",
                f"installed, but cannot be imported: {error}",
                "pip uninstall transformer-engine, which is not needed, or build it for this torch.",
            )


# ----------------------------------------------------------------------------------------------------------- machine


def _devices() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return  # told already
    try:
        import torch
    except Exception as error:  # any: a shared library that is missing raises OSError
        yield problem("torch", f"installed, but cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            name = f"sm_{properties.major}{properties.minor}"
            detail = f"{properties.name}, {properties.total_memory / _GIB:.1f} GiB, {name}"
            if not {name, f"sm_{properties.major}0"} & set(torch.cuda.get_arch_list()):
                yield problem(f"cuda:{index}", f"{detail}, for which {build} has no kernels", "Install a newer torch.")
            else:
                yield ok(f"cuda:{index}", detail)
        return
    if shutil.which("nvidia-smi") is None:
        yield ok("devices", "no GPU; everything runs on the CPU, over gloo")
    elif torch.version.cuda is None:
        yield problem("cuda", f"this machine has a GPU, but {build}", "Install a torch that is built for CUDA.")
    else:
        yield problem(
            "cuda",
            f"{build} finds no device, though nvidia-smi is there",
            "Compare the driver that nvidia-smi shows with the CUDA version of torch; look at CUDA_VISIBLE_DEVICES.",
        )


def _host() -> Iterator[Finding]:
    if importlib.util.find_spec("psutil") is None:
        return  # told already
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    detail = f"{cores} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB of memory free"
    if memory.available < 2 * _GIB:
        yield note("host", detail, "Four processes take about 3 GiB. Close other programs, or start fewer.")
    else:
        yield ok("host", detail)
    if "OMP_NUM_THREADS" not in os.environ:
        yield note(
            "threads",
            "OMP_NUM_THREADS is not set, so several processes of one machine may compete for its cores",
            "export OMP_NUM_THREADS=1",
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _GIB:
        yield note(
            "shared memory",
            f"/dev/shm holds {size / 2**20:.0f} MiB, which workers of data loaders and NCCL can fill",
            "docker run --shm-size=8g, or --ipc=host",
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        yield note("open files", f"at most {soft}, which data loaders and sockets use up", "ulimit -n 65536")
    free = shutil.disk_usage(Path.cwd()).free
    if free < _GIB:
        yield note("disk", f"{free / _GIB:.2f} GiB free here", "Checkpoints take 16 bytes a parameter: make room.")


def _network() -> Iterator[Finding]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        yield problem(
            "network",
            f"the name of this machine, {host}, has no address ({error}), which gloo asks for",
            f"Add '127.0.0.1 {host}' to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo for one machine.",
        )
        return
    yield ok("network", f"{host} is {address}")
    for name in ("http_proxy", "https_proxy"):
        local = os.environ.get("no_proxy", "") + os.environ.get("NO_PROXY", "")
        if os.environ.get(name) and "localhost" not in local and "127.0.0.1" not in local:
            yield note(name, "is set, and local addresses are not exempt", "export no_proxy=localhost,127.0.0.1")
            break
