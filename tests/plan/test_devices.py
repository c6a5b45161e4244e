"""Drivers' names lead to the right entry of the table."""

from __future__ import annotations

from pipeline.plan.devices import device_reported


def test_devices_are_found_by_what_drivers_report():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "NVIDIA A100-SXM4-80GB": "A100",
        "AMD Instinct MI300X": "MI300X",
    }
    for reported, name in names.items():
        found = device_reported(reported)
        assert found is not None and found.name == name
    assert device_reported("NVIDIA GeForce RTX 4090") is None
