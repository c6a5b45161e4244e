"""What must be true on any device: each check returns a `Verdict`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.case import TINY, Case, config_of
from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.read import CheckpointReader, newest_checkpoint
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.train_sections import CheckpointConfig

STEPS = 8
WATCHED = 3
"""Steps in which waits are counted."""
LAYOUTS = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
CLOSE = {"fp32": 2e-4, "bf16": 4e-3}
"""How far losses may be from the CPU's in float32."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check."""

    name: str
    passed: bool
    found: str
    """The figures."""


def all_checks(device: torch.device) -> Iterator[Callable[[], Verdict]]:
    """Yields the checks, cheap ones first."""
    reference = cpu_losses()
    for precision, stage in LAYOUTS:
        yield lambda p=precision, s=stage: numerics(device, p, s, reference())
    yield lambda: offload(device, reference())
    yield lambda: saves_beside_a_step(device)
    for stage in (0, 2, 3):
        yield lambda s=stage: resumes(device, s)
    for stage in (0, 2, 3):
        yield lambda s=stage: compiles(device, s)
    if device.type == "cuda":
        for stage in (0, 1, 2, 3):
            yield lambda s=stage: host_never_waits(device, s)


def cpu_losses() -> Callable[[], list[float]]:
    """Starts computing the float32 losses on the CPU, in its own process; returns a function that waits for them."""
    code = (
        "import json, torch; from benchmarks.gpu.case import *; from pipeline.train.ranks import group\n"
        "with group.process_group(World(), torch.device('cpu')):\n"
        f"    print(json.dumps(Case(config_of(TINY, 4, 1, device='cpu'), torch.device('cpu')).losses({STEPS})))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: list[list[float]] = []

    def wait() -> list[float]:
        if not found:
            found.append(json.loads(child.communicate()[0].splitlines()[-1]))
        return found[0]

    return wait


def numerics(device: torch.device, precision: str, stage: int, reference: list[float]) -> Verdict:
    """Compares a loss curve with the CPU's in float32."""
    losses = Case(config_of(TINY, 4, precision=precision, zero_stage=stage), device).losses(STEPS)
    return _curve(f"losses, {precision}, stage {stage}", losses, reference, CLOSE[precision])


def offload(device: torch.device, reference: list[float]) -> Verdict:
    """Compares a loss curve with the optimizer in host memory with the CPU's."""
    losses = Case(config_of(TINY, 4, zero_stage=2, offload_optimizer=True), device).losses(STEPS)
    return _curve("losses, fp32, stage 2, optimizer in host memory", losses, reference, CLOSE["fp32"])


def _curve(name: str, losses: list[float], reference: list[float], close: float) -> Verdict:
    furthest = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    return Verdict(name, furthest <= close, f"at most {furthest:.1e} from the CPU's, {close:.0e} allowed")


def _saver(folder: Path) -> tuple[CheckpointSaver, list[Saved]]:
    saved: list[Saved] = []
    take_over(folder, "kit")
    identity = RankIdentity(0, 1, 0, "kit", torch.distributed.HashStore())
    return CheckpointSaver(folder, identity, CheckpointConfig(), saved.append), saved


def _state(case: Case) -> dict[str, object]:
    return {"optimizer_steps": case.engine.optimizer_steps}


def saves_beside_a_step(device: torch.device) -> Verdict:
    """Saves while the next steps change the weights, and compares the files with the state at that moment."""
    case = Case(config_of({**TINY, "d_model": 512, "d_ff": 1408, "num_layers": 4}, 4, zero_stage=2), device)
    case.losses(2)
    with tempfile.TemporaryDirectory() as name:
        saver, saved = _saver(Path(name))
        wrong = 0
        for step in range(3):
            before = case.state()
            saver.save(step + 1, case.engine.fragments(), _state(case))
            case.step(before_update=saver.wait_for_copy)
            saver.wait()
            if saved[-1].error is not None:
                return Verdict("a save beside a step", False, saved[-1].error)
            reader = CheckpointReader(newest_checkpoint(Path(name)))
            for key, tensor in before.items():
                part, _, parameter = key.partition("/")
                wrong += not torch.equal(reader.read_whole(part, parameter).view(-1), tensor.view(-1))
            reader.close()
        return Verdict("a save beside a step", wrong == 0, f"3 saves of {len(before)} tensors, {wrong} of them changed")


def resumes(device: torch.device, stage: int) -> Verdict:
    """Compares the steps after a resume with those of the run that was not interrupted, bit for bit."""
    settings = {"precision": "bf16", "zero_stage": stage}
    first = Case(config_of(TINY, 4, **settings), device)
    first.losses(3)
    with tempfile.TemporaryDirectory() as name:
        saver, _ = _saver(Path(name))
        saver.save(3, first.engine.fragments(), _state(first))
        saver.wait()
        second = Case(config_of(TINY, 4, **settings), device)
        reader = CheckpointReader(newest_checkpoint(Path(name)))
        second.engine.load(reader)
        reader.close()
    second.steps = first.steps
    ours, theirs = first.losses(4), second.losses(4)
    return Verdict(f"resume, bf16, stage {stage}", ours == theirs, f"{ours[-1]!r} and {theirs[-1]!r} after four steps")


def compiles(device: torch.device, stage: int) -> Verdict:
    """Compiles the blocks; counts graphs and breaks, and compares losses with those that were not compiled."""
    settings = {"precision": "bf16", "zero_stage": stage, "activation_checkpointing": "selective"}
    plain = Case(config_of(TINY, 4, **settings), device).losses(STEPS)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._logging.set_logs(recompiles=True)  # on stderr, so that a failure says why
    losses = Case(config_of(TINY, 4, compile=True, **settings), device).losses(STEPS)
    torch._logging.set_logs()
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    furthest = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
    passed = graphs == 1 and breaks == 0 and furthest <= CLOSE["bf16"]
    return Verdict(
        f"compiled blocks, bf16, stage {stage}", passed, f"{graphs} graph, {breaks} breaks, {furthest:.1e} from eager"
    )


def host_never_waits(device: torch.device, stage: int) -> Verdict:
    """Counts what makes the host wait for the device in healthy steps: by PyTorch's own checks, and by the profiler.

    At stage 3 DeepSpeed itself waits, once per backward pass and, with one rank, for each copy that stands in for a
    gathering; the check is that nothing else does.
    """
    case = Case(config_of(TINY, 4, 1 if stage == 1 else 2, precision="bf16", zero_stage=stage), device)
    case.losses(3)
    batches = [list(case.batches()) for _ in range(WATCHED)]
    with _watched() as waits, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        pending = [case.step(batch) for batch in batches]
    del pending
    profiled = sum("Synchronize" in event.name for event in seen.events())
    ours = sum(count for place, count in waits.items() if "deepspeed" not in place)
    found = f"{ours} waits, {sum(waits.values()) - ours} of DeepSpeed, {profiled} in the profile of {WATCHED} steps"
    passed = ours == 0 and (stage == 3 or profiled == 0)
    return Verdict(f"the host never waits, bf16, stage {stage}", passed, found)


@contextlib.contextmanager
def _watched() -> Iterator[Counter[str]]:
    """Counts the waits inside by the file and line that caused them."""
    waits: Counter[str] = Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself first
        yield waits
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchronizing" in str(one.message) and "prototype" not in str(one.message):
            waits[f"{one.filename}:{one.lineno}"] += 1
