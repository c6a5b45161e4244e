"""Drivers' names lead to the right entry of the table."""

from __future__ import annotations

import pytest

from pipeline.plan.devices import DEVICES, device_reported


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA B200", "b200"), ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"), ("NVIDIA L40S", "l40s"), ("NVIDIA A40", "a40"),
        ("Tesla V100-SXM2-32GB", "v100"), ("AMD Instinct MI300X", "mi300x"), ("AMD Instinct MI250X", "mi250x"),
    ],
)  # fmt: skip
def test_devices_are_found_by_what_drivers_report(reported: str, key: str):
    assert device_reported(reported) is DEVICES[key]


@pytest.mark.parametrize(
    "reported",
    ["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090", "NVIDIA L40", "NVIDIA GB200", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_name_that_only_resembles_a_device_is_unknown(reported: str):
    assert device_reported(reported) is None


def test_every_device_is_found_by_its_own_name():
    """No entry hides behind one with fewer words."""
    for device in DEVICES.values():
        assert device_reported(device.name) is device


def test_peaks_fall_with_the_width_of_the_numbers():
    for device in DEVICES.values():
        assert device.flops_per_s("bf16") >= device.flops_per_s("tf32") >= device.flops_per_s("fp32") > 0


def test_only_a_precision_that_the_device_lacks_is_warned_of():
    assert [key for key, device in DEVICES.items() if device.lacks("bf16")] == ["v100"]
    assert not any(device.lacks("fp32") for device in DEVICES.values())
