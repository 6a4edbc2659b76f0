"""Clusters and the names of devices."""

import math

import pytest

from lightning_megatron.planner import ACCELERATORS, GIB, LINKS, Cluster, accelerator_of_device


@pytest.mark.parametrize(
    ("device", "accelerator"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_devices_are_known_by_the_name_cuda_gives_them(device: str, accelerator: str) -> None:
    assert accelerator_of_device(device) == ACCELERATORS[accelerator]


def test_a_device_that_is_not_known_is_no_other() -> None:
    with pytest.raises(ValueError, match=r"named 'NVIDIA RTX A1000'\. Known: h100"):
        accelerator_of_device("NVIDIA RTX A1000")
    assert accelerator_of_device("NVIDIA H100 80GB HBM3", 60 * GIB).memory == 60 * GIB


def test_every_accelerator_names_links_that_exist() -> None:
    for accelerator in ACCELERATORS.values():
        assert accelerator.intra_node in LINKS
        assert accelerator.inter_node in LINKS


def test_a_cluster_smaller_than_a_node_and_one_of_several() -> None:
    assert Cluster.of("h100", 2).gpus_per_node == 2
    cluster = Cluster.of("H100-PCIe", 32, gpus_per_node=4, nics_per_node=1)
    assert (cluster.num_nodes, cluster.intra_node.name) == (8, "pcie5")
    # One card for four GPUs: four rings share it, and so do four senders.
    card = LINKS["ib_ndr"].rate
    assert cluster.ring_rate(stride=4, size=8) == card / 4
    assert cluster.hop_rate(stride=4, size=8) == card / 4
    assert cluster.ring_rate(stride=1, size=4) == LINKS["pcie5"].rate
    assert cluster.ring_rate(stride=1, size=1) == math.inf
    assert Cluster.of("a100", 64, inter_node="ethernet_25g").inter_node.rate == 3.125e9 * 0.7
