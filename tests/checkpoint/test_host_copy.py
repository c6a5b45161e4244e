"""The copies of a save lie in one slab of host memory: exact, allocated once, pinned where the weights are on a GPU."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.checkpoint.host_copy import HostCopy, OwnedFragment
from pipeline.checkpoint.layout import KEYS
from pipeline.errors import CheckpointError

LENGTHS = {"a": 3, "b": 1000, "c": 17}


def fragments(value: float = 0.0) -> list[OwnedFragment]:
    """Three parameters; each weight and moment is filled with its own number."""
    return [
        OwnedFragment(name, (n,), 0, {key: torch.full((n,), value + i + 10 * j) for j, key in enumerate(KEYS)})
        for i, (name, n) in enumerate(LENGTHS.items())
    ]


def assert_copied(copies: dict[str, torch.Tensor], parts: list[OwnedFragment]) -> None:
    assert set(copies) == {f"{key}/{part.name}" for part in parts for key in KEYS}
    for part in parts:
        for key in KEYS:
            assert torch.equal(copies[f"{key}/{part.name}"], part.tensors[key])


def test_all_copies_share_one_allocation_of_exactly_their_size() -> None:
    parts = fragments()
    copies = HostCopy().take(parts, None)
    assert_copied(copies, parts)
    assert {copy.untyped_storage().data_ptr() for copy in copies.values()} == {copies["weight/a"].data_ptr()}
    assert copies["weight/a"].untyped_storage().nbytes() == 4 * len(KEYS) * sum(LENGTHS.values())


def test_every_save_uses_the_memory_that_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostCopy()
    host.reserve(fragments())

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a save allocates nothing")

    monkeypatch.setattr(torch, "empty", refused)
    first = host.take(fragments(1.0), None)["weight/b"]
    second = host.take(fragments(2.0), None)["weight/b"]
    assert first.data_ptr() == second.data_ptr()
    assert_copied(host.take(fragments(3.0), None), fragments(3.0))


def test_other_fragments_get_a_slab_of_their_own_size() -> None:
    host = HostCopy()
    host.take(fragments(), None)
    parts = fragments(5.0)[1:]
    copies = host.take(parts, None)
    assert_copied(copies, parts)
    assert copies["weight/b"].untyped_storage().nbytes() == 4 * len(KEYS) * (1000 + 17)


def test_a_file_holds_each_copy_once_and_nothing_else_of_the_slab(tmp_path: Path) -> None:
    copies = HostCopy().take(fragments(), None)
    safetensors.torch.save_file(copies, tmp_path / "rank")
    assert_copied(safetensors.torch.load_file(tmp_path / "rank"), fragments())
    content = 4 * len(KEYS) * sum(LENGTHS.values())
    assert content < (tmp_path / "rank").stat().st_size < content + 2000  # the header


class Driver:
    """CUDA's runtime, as far as pinning goes."""

    def __init__(self, status: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.status = status

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del self.pinned[address]
        return 0


def on_gpu(length: int) -> list[OwnedFragment]:
    tensor = SimpleNamespace(numel=lambda: length, is_cuda=True)
    return [OwnedFragment("w", (length,), 0, dict.fromkeys(KEYS, tensor))]  # type: ignore[arg-type]


def test_memory_for_weights_on_a_gpu_is_pinned_to_the_byte_and_unpinned_before_it_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = HostCopy()
    host.reserve(fragments())
    assert driver.pinned == {}, "weights on the CPU need no pinned memory"
    for length in (1025, 1025, 7):
        host.reserve(on_gpu(length))
        assert list(driver.pinned.values()) == [4 * len(KEYS) * length]
    del host
    gc.collect()
    assert driver.pinned == {}


def test_memory_that_cannot_be_pinned_is_an_error_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(status=2))
    with pytest.raises(CheckpointError, match=r"1\.20 GB"):
        HostCopy().reserve(on_gpu(100_000_000))
