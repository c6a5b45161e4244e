"""The vendors' peak figures of devices and their networks, for MFU and for planning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import UsageError

GIB = 2.0**30


class Products(NamedTuple):
    """Shares of the peak that runs reach in matrix products."""

    lowest: float
    """In the slowest runs."""
    expected: float | None
    """As calibrated with published runs; None where there are too few."""
    highest: float
    """In the fastest runs."""


# From the runs of benchmarks/published, on A100, H100 and H200; the GH200 has the H200's chip. Too few were found for
# other devices: one, on the MI250, gives the lowest share.
ELSEWHERE = Products(0.25, None, 1.00)
AMPERE = Products(0.55, 0.90, 1.00)
HOPPER = Products(0.50, 0.70, 0.85)


@dataclass(frozen=True)
class Device:
    """One kind of device in its usual node."""

    name: str
    """Words that all occur, as whole words, in the name that CUDA or ROCm reports."""
    memory_gib: float
    """Memory that PyTorch can see; 0 if it depends on the node."""
    bf16_flops_per_s: float
    """Dense peak, without sparsity."""
    tf32_flops_per_s: float
    """Dense peak of the tensor cores for float32 rounded to 10 bits, where the device has it; else the float32 peak."""
    fp32_flops_per_s: float
    """Peak outside the tensor cores, which PyTorch does not use for float32 by default."""
    memory_gb_per_s: float
    """Bandwidth of the device's memory."""
    per_node: int
    """Devices per node."""
    intra_gb_per_s: float
    """Bandwidth to the other devices of the node, one direction."""
    inter_gb_per_s: float
    """Bandwidth of the whole node to other nodes, one direction, all adapters together."""
    host_gb_per_s: float
    """Bandwidth to host memory, which limits how fast a save copies."""
    products: Products = ELSEWHERE
    """Shares of the peak that runs reach in matrix products."""
    has_bf16: bool = True
    """Whether it computes in bf16; if not, PyTorch computes in fp32 and rounds."""

    def lacks(self, precision: str) -> str | None:
        """Returns what is wrong with a precision that the device does not have; None for one that it has."""
        if precision != "bf16" or self.has_bf16:
            return None
        return (
            f"a {self.name} has no unit for bf16, so that PyTorch computes in fp32 and rounds: slower, and less exact"
        )

    def flops_per_s(self, precision: str) -> float:
        """Returns the peak for `bf16`, `tf32` or `fp32`."""
        peaks = {"bf16": self.bf16_flops_per_s, "tf32": self.tf32_flops_per_s, "fp32": self.fp32_flops_per_s}
        return peaks[precision]


# Peaks and bandwidths: the vendors' data sheets (docs/scaling.md names them). Memory: what PyTorch reports. Nodes: the
# vendors' reference nodes (DGX A100, DGX H100, an MI300X platform, four GH200 as in Alps, Frontier's for the MI250X,
# where a device is one of the two dies of a card). To the host: 80% of PCIe or NVLink-C2C. The V100 has no unit for
# bfloat16. The order matters: the first entry whose words all occur wins.
DEVICES = {
    "b200": Device("B200", 178.3, 2250e12, 1125e12, 75e12, 7700, 8, 900, 400, 50),
    "h200-nvl": Device("H200 NVL", 139.8, 835e12, 417e12, 60e12, 4800, 8, 64, 100, 50),
    "h200": Device("H200", 139.8, 989e12, 494e12, 67e12, 4800, 8, 450, 400, 50, HOPPER),
    "gh200": Device("GH200", 94.5, 989e12, 494e12, 67e12, 4000, 4, 150, 100, 360, HOPPER),
    "h100-pcie": Device("H100 PCIe", 79.1, 756e12, 378e12, 51e12, 2000, 8, 64, 100, 50),
    "h100-nvl": Device("H100 NVL", 93.1, 835e12, 417e12, 60e12, 3900, 8, 64, 100, 50),
    "h100": Device("H100", 79.1, 989e12, 494e12, 67e12, 3350, 8, 450, 400, 50, HOPPER),
    "a100-40": Device("A100 40GB", 39.4, 312e12, 156e12, 19.5e12, 1555, 8, 300, 200, 25, AMPERE),
    "a100": Device("A100", 79.1, 312e12, 156e12, 19.5e12, 2039, 8, 300, 200, 25, AMPERE),
    "l40s": Device("L40S", 44.4, 362e12, 183e12, 91.6e12, 864, 8, 32, 50, 25),
    "a40": Device("A40", 44.4, 150e12, 74.8e12, 37.4e12, 696, 8, 32, 25, 25),
    "v100": Device("V100", 31.7, 15.7e12, 15.7e12, 15.7e12, 900, 8, 150, 50, 12, has_bf16=False),
    "mi300x": Device("MI300X", 192.0, 1307e12, 653e12, 163e12, 5300, 8, 448, 400, 50),
    "mi250x": Device("MI250X", 64.0, 191.5e12, 23.9e12, 23.9e12, 1638, 8, 50, 100, 25),
    # One server core: two 256-bit FMA units at 3 GHz; bfloat16 is no faster without AMX. Memory belongs to the node.
    # Copying for a save: what it slows steps down by at 100M parameters (benchmarks/checkpoint.py: 1.2 to 2.3).
    "cpu": Device("CPU core", 0.0, 96e9, 96e9, 96e9, 10, 32, 5, 3, 1.2),
}


def device_named(name: str) -> Device:
    """Returns a device of the table by its key, for example `h100`.

    Raises:
        UsageError: The table has no such device; the message lists all.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError as error:
        raise UsageError(f"no device {name!r} in the table; there are: {', '.join(DEVICES)}") from error


def device_reported(name: str) -> Device | None:
    """Returns the device whose words all occur in the name that a driver reports; None for a MIG slice."""
    words = set(re.split(r"[\s/-]+", name))
    if "MIG" in words:  # its peak is a fraction that the name does not tell
        return None
    return next((d for d in DEVICES.values() if words.issuperset(d.name.split())), None)
