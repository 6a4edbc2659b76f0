"""Accelerators, links and clusters: the numbers that the planner divides by.

Peaks are the vendor's dense 16-bit tensor-core figures (never the sparse ones), memory is what CUDA reports as the
device's total, link bandwidths are one direction of one GPU or one network card. The units are FLOP/s, bytes, bytes/s
and seconds.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

GIB = 2**30
_MAX_NAMES_LISTED = 20


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of ``known``: names the value and the nearest valid ones."""
    names = list(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    known_names = f" Known: {', '.join(names)}." if len(names) <= _MAX_NAMES_LISTED or not near else ""
    return ValueError(f"{kind}={name} is not known.{hint}{known_names}")


def lookup[T](kind: str, name: str, table: Mapping[str, T]) -> T:
    """``table[name]``, where dashes and case do not matter.

    Raises:
        ValueError: ``name`` is not in ``table``.
    """
    key = name.lower().replace("-", "_")
    if key not in table:
        raise unknown(kind, name, table)
    return table[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection between GPUs."""

    name: str
    bandwidth: float
    """Peak bytes per second in one direction, of one GPU (inside a node) or one network card (between nodes)."""
    latency: float
    """Seconds for one hop of an empty message, launch of the collective included."""
    efficiency: float = 0.8
    """Fraction of the peak that NCCL's large messages reach in a ring of many ranks, and copy engines between any two:
    370 of 450 GB/s on NVLink 4, 235 of 300 on NVLink 3."""
    pair_efficiency: float | None = None
    """The same of NCCL between two ranks, ``None`` where it has not been measured. Two H200 reach 130 of 450 GB/s in
    a step, and 193 with nothing beside it."""

    @property
    def rate(self) -> float:
        """Bytes per second that large messages reach."""
        return self.bandwidth * self.efficiency

    def nccl_rate(self, ranks: int) -> float:
        """Bytes per second that NCCL's large messages reach in a ring of ``ranks``."""
        pair = self.pair_efficiency if ranks == 2 else None
        return self.bandwidth * (self.efficiency if pair is None else pair)


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(name="nvlink2", bandwidth=150e9, latency=6e-6),
        Link(name="nvlink3", bandwidth=300e9, latency=6e-6),
        Link(name="nvlink4", bandwidth=450e9, latency=6e-6, pair_efficiency=0.29),
        Link(name="nvlink5", bandwidth=900e9, latency=6e-6),
        Link(name="pcie3", bandwidth=15.75e9, latency=10e-6, efficiency=0.75),
        Link(name="pcie4", bandwidth=31.5e9, latency=10e-6, efficiency=0.75),
        Link(name="pcie5", bandwidth=63e9, latency=10e-6, efficiency=0.75),
        Link(name="ib_edr", bandwidth=12.5e9, latency=15e-6, efficiency=0.85),
        Link(name="ib_hdr", bandwidth=25e9, latency=15e-6, efficiency=0.85),
        Link(name="ib_ndr", bandwidth=50e9, latency=15e-6, efficiency=0.85),
        Link(name="ib_xdr", bandwidth=100e9, latency=15e-6, efficiency=0.85),
        Link(name="ethernet_10g", bandwidth=1.25e9, latency=50e-6, efficiency=0.7),
        Link(name="ethernet_25g", bandwidth=3.125e9, latency=50e-6, efficiency=0.7),
        Link(name="ethernet_100g", bandwidth=12.5e9, latency=40e-6, efficiency=0.7),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes that CUDA reports as the device's total."""
    flops: float
    """Peak dense FLOP/s in 16 bits: bf16, or fp16 where there is no bf16."""
    flops_fp32: float
    """Peak dense FLOP/s of 32-bit matrix multiplications: TF32 where there is TF32."""
    memory_bandwidth: float
    """Peak bytes per second of the device's memory, reads and writes together."""
    intra_node: str
    """Link to the other GPUs of the node, a key of :data:`LINKS`."""
    inter_node: str
    """Network card that a node of these GPUs usually has per GPU, a key of :data:`LINKS`."""
    attention_efficiency: float
    """Fraction of ``flops`` that FlashAttention-2 reaches (arXiv:2307.08691, section 4: 225 TFLOP/s of an A100's 312 at
    best, 335 of an H100's 989), lowered for head sizes and sequences that are not the best."""


def _gpu(
    name: str, *, gib: float, tflops: float, tf32: float, tb_s: float, links: tuple[str, str], attention: float
) -> Accelerator:
    return Accelerator(
        name=name,
        memory=gib * GIB,
        flops=tflops * 1e12,
        flops_fp32=tf32 * 1e12,
        memory_bandwidth=tb_s * 1e12,
        intra_node=links[0],
        inter_node=links[1],
        attention_efficiency=attention,
    )


ACCELERATORS: dict[str, Accelerator] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", gib=79.1, tflops=989.4, tf32=494.7, tb_s=3.35, links=("nvlink4", "ib_ndr"), attention=0.32),
        _gpu("h100_pcie", gib=79.1, tflops=756, tf32=378, tb_s=2.0, links=("pcie5", "ib_ndr"), attention=0.32),
        _gpu("h200", gib=139.8, tflops=989.4, tf32=494.7, tb_s=4.8, links=("nvlink4", "ib_ndr"), attention=0.32),
        _gpu("b200", gib=178.4, tflops=2250, tf32=1125, tb_s=8.0, links=("nvlink5", "ib_ndr"), attention=0.25),
        _gpu("a100", gib=79.2, tflops=312, tf32=156, tb_s=2.039, links=("nvlink3", "ib_hdr"), attention=0.55),
        _gpu("a100_40gb", gib=39.4, tflops=312, tf32=156, tb_s=1.555, links=("nvlink3", "ib_hdr"), attention=0.55),
        _gpu("a100_pcie", gib=79.2, tflops=312, tf32=156, tb_s=1.935, links=("pcie4", "ib_hdr"), attention=0.55),
        _gpu("v100", gib=31.7, tflops=125, tf32=15.7, tb_s=0.9, links=("nvlink2", "ib_edr"), attention=0.4),
        _gpu("l40s", gib=44.4, tflops=362, tf32=183, tb_s=0.864, links=("pcie4", "ib_hdr"), attention=0.5),
        _gpu("a10", gib=22.0, tflops=125, tf32=62.5, tb_s=0.6, links=("pcie4", "ethernet_100g"), attention=0.5),
        _gpu("l4", gib=22.0, tflops=121, tf32=60, tb_s=0.3, links=("pcie4", "ethernet_25g"), attention=0.5),
        _gpu("t4", gib=14.6, tflops=65, tf32=8.1, tb_s=0.32, links=("pcie3", "ethernet_25g"), attention=0.4),
        _gpu("rtx4090", gib=23.6, tflops=165.2, tf32=82.6, tb_s=1.008, links=("pcie4", "ethernet_10g"), attention=0.5),
    )
}


# What the names that CUDA gives devices contain, the more particular first.
_DEVICE_NAMES = (
    ("H100 PCIe", "h100_pcie"),
    ("H100", "h100"),
    ("H200", "h200"),
    ("B200", "b200"),
    ("A100-PCIE-40GB", "a100_40gb"),
    ("A100-SXM4-40GB", "a100_40gb"),
    ("A100 80GB PCIe", "a100_pcie"),
    ("A100", "a100"),
    ("V100", "v100"),
    ("L40S", "l40s"),
    ("A10", "a10"),
    ("L4", "l4"),
    ("T4", "t4"),
    ("RTX 4090", "rtx4090"),
)


def accelerator_of_device(name: str, memory: float | None = None) -> Accelerator:
    """The accelerator whose device CUDA calls ``name``, such as ``"NVIDIA H100 80GB HBM3"``.

    Args:
        name: ``torch.cuda.get_device_name()``.
        memory: Bytes that the device really has, where known.

    Raises:
        ValueError: no accelerator here has devices of this name.
    """
    words = name.split()
    for part, key in _DEVICE_NAMES:
        # Whole words, or "L4" would be found in "L40S" and "A10" in "A100".
        if part in name and (" " in part or any(re.fullmatch(rf"{part}(-.*|G)?", word) for word in words)):
            accelerator = ACCELERATORS[key]
            return accelerator if memory is None else replace(accelerator, memory=memory)
    raise ValueError(f"No accelerator known here has devices named {name!r}. Known: {', '.join(ACCELERATORS)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs of one kind, in nodes of equal size.

    Raises:
        ValueError: sizes below one, or a last node that would not be full.
    """

    accelerator: Accelerator
    num_gpus: int
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    nics_per_node: int

    def __post_init__(self) -> None:
        sizes = {"gpus": self.num_gpus, "gpus_per_node": self.gpus_per_node, "nics_per_node": self.nics_per_node}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}, but must be at least 1.")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            below = self.num_gpus // self.gpus_per_node * self.gpus_per_node
            raise ValueError(
                f"gpus={self.num_gpus} do not fill nodes of gpus_per_node={self.gpus_per_node}. Nearest: gpus={below} "
                f"or gpus={below + self.gpus_per_node}, or another gpus_per_node."
            )

    @classmethod
    def of(
        cls,
        gpu: str,
        num_gpus: int,
        *,
        gpus_per_node: int = 8,
        intra_node: str | None = None,
        inter_node: str | None = None,
        nics_per_node: int | None = None,
    ) -> Cluster:
        """A cluster by names: ``Cluster.of("h100", 64)`` is eight DGX H100.

        Links and network cards left out are those usual for the GPU, one card per GPU.

        Raises:
            ValueError: a name that is not known, or sizes that do not fit.
        """
        accelerator = lookup("gpu", gpu, ACCELERATORS)
        return cls(
            accelerator=accelerator,
            num_gpus=num_gpus,
            gpus_per_node=min(gpus_per_node, num_gpus) if num_gpus > 0 else gpus_per_node,
            intra_node=lookup("intra_node", intra_node or accelerator.intra_node, LINKS),
            inter_node=lookup("inter_node", inter_node or accelerator.inter_node, LINKS),
            nics_per_node=nics_per_node if nics_per_node is not None else min(gpus_per_node, max(num_gpus, 1)),
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster."""
        return math.ceil(self.num_gpus / self.gpus_per_node)

    def with_memory(self, gib: float) -> Cluster:
        """The same cluster whose GPUs have ``gib`` GiB of memory."""
        return replace(self, accelerator=replace(self.accelerator, memory=gib * GIB))

    def ring_rate(self, stride: int, size: int) -> float:
        """Bytes per second at which one rank sends in a ring of ``size`` ranks that lie ``stride`` ranks apart.

        A ring inside a node runs at the link's rate. One that leaves it shares the node's network cards with the other
        rings that leave it: ``stride`` of them, since the ranks in between belong to other groups of the same kind.
        """
        if size == 1:
            return math.inf
        if stride * size <= self.gpus_per_node:
            return self.intra_node.nccl_rate(size)
        rings = min(stride, self.gpus_per_node)
        return min(self.intra_node.rate, self.inter_node.rate * self.nics_per_node / rings)

    def hop_rate(self, stride: int, size: int) -> float:
        """Bytes per second of a message to the next rank, ``stride`` ranks away, while all GPUs of a node send."""
        if stride * size <= self.gpus_per_node:
            return self.intra_node.nccl_rate(2)
        return self.inter_node.rate * self.nics_per_node / self.gpus_per_node

    def latency(self, stride: int, size: int) -> float:
        """Seconds of one hop in such a group."""
        return (self.intra_node if stride * size <= self.gpus_per_node else self.inter_node).latency
