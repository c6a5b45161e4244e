"""What preflight says about the network: its transport, its rate, and a fallback that nobody would notice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from pipeline.run.world import World
from pipeline.train.ranks import network
from pipeline.train.ranks.network import Measured, judged, measure, noted_transport, sentence, transport_in
from tests import processes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEGABYTES_8 = 8 << 20


def found(transport: str = "NCCL over IB", seconds: float = 0.01, infiniband: bool = True) -> Measured:
    return Measured(transport, seconds, MEGABYTES_8, infiniband)


def test_the_rate_is_what_each_rank_sends_by_the_slowest() -> None:
    network = judged([found(seconds=s) for s in (0.01, 0.02, 0.01, 0.01)], ["n1", "n1", "n2", "n2"])
    assert network.gb_per_s == pytest.approx(1.5 * MEGABYTES_8 / 0.02 / 1e9, abs=1e-3)
    assert (network.transport, network.ranks, network.nodes, network.warning) == ("NCCL over IB", 4, 2, None)
    assert "NCCL over IB" in sentence(network)


def test_sockets_beside_an_active_infiniband_port_are_a_warning_that_names_the_node() -> None:
    slow = [found("NCCL over Socket", infiniband=False), found("NCCL over Socket")]
    warned = judged(slow, ["n1", "n2"])
    assert warned.warning is not None and warned.warning.startswith("n2 ") and warned.warning in sentence(warned)
    assert judged([found("NCCL over Socket", infiniband=False)] * 2, ["n1", "n2"]).warning is None
    assert judged([found("gloo over TCP")] * 2, ["n1", "n2"]).warning is None


def test_within_one_node_no_transport_between_nodes_is_claimed() -> None:
    one = judged([found("NCCL over Socket")] * 2, ["n1", "n1"])
    assert "Socket" not in one.transport and one.warning is None


def test_the_transport_is_what_nccl_notes_while_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    with noted_transport(CUDA) as file:
        assert file is not None and os.environ["NCCL_DEBUG_FILE"] == str(file)
        assert transport_in(file, CUDA) == "NCCL"
        file.write_text("n1:10:10 [0] NCCL INFO Initialized NET plugin IB\nn1:10:10 [0] NCCL INFO Using network IB\n")
        assert transport_in(file, CUDA) == "NCCL over IB"
    assert not [name for name in os.environ if name.startswith("NCCL_DEBUG")]


def test_a_user_who_reads_nccls_output_himself_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with noted_transport(CUDA) as file:
        assert file is None and os.environ["NCCL_DEBUG"] == "WARN" and transport_in(file, CUDA) == "NCCL"
    assert os.environ["NCCL_DEBUG"] == "WARN"
    with noted_transport(CPU) as file:
        assert transport_in(file, CPU) == "gloo over TCP"


@pytest.mark.parametrize(
    ("state", "layer", "active"),
    [("4: ACTIVE", "InfiniBand", True), ("1: DOWN", "InfiniBand", False), ("4: ACTIVE", "Ethernet", False)],
)
def test_only_an_active_infiniband_port_counts(tmp_path: Path, state: str, layer: str, active: bool) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text(f"{layer}\n")
    assert network._has_infiniband(tmp_path) is active
    assert not network._has_infiniband(tmp_path / "missing")


def measured(world: World) -> tuple[float, int]:
    one = measure(CPU, "gloo over TCP")
    return one.seconds, one.bytes


def test_ranks_measure_the_same_sum(tmp_path: Path) -> None:
    first, second = processes.on_ranks(measured, 2, tmp_path / "log")
    assert first == second and 0 < first[0] < 30 and 64 << 10 <= first[1] <= MEGABYTES_8


def test_a_slow_network_is_measured_with_a_small_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []

    def slow(values: torch.Tensor, *_: object) -> None:
        summed.append(4 * values.numel())
        time.sleep(0.15 if values.numel() > 1 else 0.0)

    monkeypatch.setattr("pipeline.train.ranks.network.dist.all_reduce", slow)
    found = measure(CPU, "gloo over TCP")
    assert found.bytes == max(summed) <= 64 << 10 and found.seconds >= 0.15
