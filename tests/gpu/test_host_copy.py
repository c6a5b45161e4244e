"""The copies of a save on a real GPU: pinned to the byte, and made while the device computes."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.host_copy import HostCopy, OwnedFragment, device_event
from pipeline.checkpoint.layout import KEYS

pytestmark = pytest.mark.gpu

# Just above powers of two, where rounding up costs most: 3 x 400 MB.
LENGTHS = [(1 << 24) + 1, (1 << 26) + 1, (1 << 24) + 1]


def fragments(value: float) -> list[OwnedFragment]:
    return [
        OwnedFragment(f"w{i}", (n,), 0, {key: torch.full((n,), value + j, device="cuda") for j, key in enumerate(KEYS)})
        for i, n in enumerate(LENGTHS)
    ]


def resident_bytes() -> int:
    """Memory of this process that is really there; pinned memory always is."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_host_memory_is_pinned_to_the_byte_and_given_back() -> None:
    parts = fragments(1.0)
    torch.cuda.synchronize()
    exact, before = 4 * len(KEYS) * sum(LENGTHS), resident_bytes()
    host = HostCopy()
    host.reserve(parts)
    assert abs(resident_bytes() - before - exact) < 64 << 20
    copies = host.take(parts, device_event(parts))
    assert all(copy.is_pinned() for copy in copies.values())
    for part in parts:
        for key in KEYS:
            assert torch.equal(copies[f"{key}/{part.name}"], part.tensors[key].cpu())
    del host, copies
    assert resident_bytes() - before < exact / 2


def test_the_copy_waits_for_the_step_and_runs_beside_the_next_one() -> None:
    """The weights change after the event; the copy holds what they were. Kernels queued behind it do not delay it."""
    parts = fragments(1.0)
    host = HostCopy()
    host.take(parts, device_event(parts))
    for part in parts:
        part.tensors["weight"].fill_(7.0)
    ready = device_event(parts)
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        busy = busy @ busy * 1e-2
    queued = torch.cuda.Event()
    queued.record()
    began = time.monotonic()
    copies = host.take(parts, ready)
    seconds = time.monotonic() - began
    assert not queued.query(), f"the device had finished its work before the copy ended, after {seconds:.3f} s"
    assert all(bool((copies[f"weight/{part.name}"] == 7.0).all()) for part in parts)
    torch.cuda.synchronize()
