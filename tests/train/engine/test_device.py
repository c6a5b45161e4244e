"""What only a GPU executes, as far as it can be tested without one: on tensors that only pretend to be on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.checkpoint import host_copy
from pipeline.checkpoint.host_copy import HostCopy, OwnedFragment
from pipeline.checkpoint.layout import KEYS
from pipeline.optim.adamw import AdamW
from pipeline.run.world import World
from pipeline.train.engine import deepspeed_setup
from pipeline.train.engine import engine as module
from pipeline.train.engine.engine import Engine


@pytest.fixture
def pretended() -> Iterator[None]:
    """Tensors on `cuda` have no content: reading one on the host is an error."""
    with FakeTensorMode():
        yield


def parameters(device: str) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.empty(10, device=device)) for _ in range(2)]
    for parameter in made:
        parameter.grad = torch.empty(10, device=device)
    return made


def test_reading_a_pretended_tensor_is_an_error(pretended: None) -> None:
    """Otherwise the test below would say nothing."""
    with pytest.raises(DataDependentOutputException):
        bool(torch.empty((), device="cuda").isfinite())


def test_clipping_and_the_step_read_nothing_from_the_device(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = parameters("cuda")
    optimizer = AdamW(weights, lr=1e-2, weight_decay=0.1)
    engine = SimpleNamespace(
        device=torch.device("cuda", 0), _world=World(), _offloads=False, _optimizer=optimizer,
        _partitions=SimpleNamespace(replicated=True, gradients=lambda: [p.grad for p in weights]),
    )  # fmt: skip
    monkeypatch.setattr(module, "PendingNumbers", lambda numbers, world_size: numbers)
    for _ in range(2):
        numbers = Engine._reduce_and_clip(engine, 1.0, [torch.empty((), device="cuda")], 1.0)  # type: ignore[arg-type]
        optimizer.step()
    assert numbers.is_cuda and numbers.shape == (3,)  # type: ignore[attr-defined]
    assert isinstance(optimizer.counts, torch.Tensor)
    assert all(state["step"].is_cuda for state in optimizer.state.values())


def test_the_copy_of_a_save_is_made_and_waited_for_on_the_device_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The saving thread's own current device is always the first one."""
    done: list[str] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            done.append(f"stream of {device}")

        def wait_event(self, event: Any) -> None:
            done.append(f"waits for {event}")

        def synchronize(self) -> None:
            done.append("finished")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    weight = SimpleNamespace(device=torch.device("cuda", 3))
    with host_copy._copy_stream([OwnedFragment("w", (4,), 0, {"weight": weight})], "the step"):  # type: ignore[dict-item]
        done.append("copies")
    assert done == ["stream of cuda:3", "waits for the step", "copies", "finished"]


def test_on_the_cpu_the_copy_needs_no_stream() -> None:
    tensors = {key: torch.arange(4.0) for key in KEYS}
    copies = HostCopy().take([OwnedFragment("w", (4,), 0, tensors)], None)
    assert set(copies) == {"weight/w", "exp_avg/w", "exp_avg_sq/w"}
    assert all(torch.equal(copy, torch.arange(4.0)) for copy in copies.values())


def test_deepspeed_is_given_the_number_of_the_device_and_not_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm shows rank 5 its own GPU only, that is cuda:0; DeepSpeed would ask for cuda:5."""
    # DeepSpeed chooses its accelerator once per process, at its first import: later tests train on the CPU.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setattr(deepspeed, "init_distributed", dict)
    deepspeed_setup.prepare(torch.device("cuda", 0))
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("0", "cuda")
