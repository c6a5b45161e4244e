"""Hosts: namespaces, each with its own address and name, connected by a bridge in the login host."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.devcluster.settings import CGROUPS, LOGIN, PRIVATE, Settings
from pipeline.errors import PipelineError
from pipeline.files import write_text

NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
_START_S = 10.0
_END_S = 10.0


def start_host(settings: Settings, host: str) -> None:
    """Starts a host and connects it to the network.

    Raises:
        PipelineError: The host did not start; the message ends with its output.
    """
    private = [str(settings.database)] if host == LOGIN else list(PRIVATE)
    init = [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py"))]
    reader, writer = os.pipe()
    try:
        with _log(settings, host).open("ab") as log:
            # setsid detaches it: it outlives this command, and no process here has to reap it.
            subprocess.run(
                ["setsid", "--fork", "unshare", *NAMESPACES, "--fork", "--propagation", "private",
                 *init, host, str(settings.state / "etc" / "hosts"), str(writer), *private],
                pass_fds=[writer], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
            )  # fmt: skip
        os.close(writer)
        ready, _, _ = select.select([reader], [], [], _START_S)
        said = os.read(reader, 32).decode() if ready else ""
    finally:
        os.close(reader)
    if not said:
        raise PipelineError(f"host {host} did not start in {_START_S:g} s:\n{tail(_log(settings, host))}")
    pid = int(said)
    write_text(_pid_file(settings, host), f"{pid} {_start_time(pid)}\n")
    _wire(settings, host, pid)


def kill_host(settings: Settings, host: str) -> None:
    """Cuts the power: the kernel kills every process of the host at once. Does nothing if the host is down."""
    pid = pid_of(settings, host)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid_of(settings, host) is None, _END_S, f"end of host {host}")
    _pid_file(settings, host).unlink(missing_ok=True)
    remove_cgroups(host)


def pid_of(settings: Settings, host: str) -> int | None:
    """Returns the process id, on the machine, of a host's first process; None if the host is down."""
    try:
        pid, start = _pid_file(settings, host).read_text().split()
    except FileNotFoundError:
        return None
    # The number may belong to another process by now.
    return int(pid) if _start_time(int(pid)) == start else None


def enter(settings: Settings, host: str, command: list[str], folder: Path = Path("/")) -> list[str]:
    """Returns the command line that runs `command` on a host, in a folder there, with Slurm's clients on PATH.

    Raises:
        PipelineError: The host is down.
    """
    pid = pid_of(settings, host)
    if pid is None:
        raise PipelineError(f"host {host} is down")
    # `env` changes the folder once inside; nsenter's --wd would keep a folder of the outer mounts.
    inside = [f"--chdir={folder}", *(f"{name}={value}" for name, value in environment(settings).items())]
    return ["nsenter", "--target", str(pid), *NAMESPACES, "--", "env", *inside, *command]


def environment(settings: Settings) -> dict[str, str]:
    """Returns the variables that make a shell, and everything it starts, use this cluster."""
    old = [folder for folder in os.environ.get("PATH", os.defpath).split(":") if folder != str(settings.bin)]
    return {
        "PIPELINE_DEVCLUSTER": str(settings.state),
        "SLURM_CONF": str(settings.conf),
        "PATH": ":".join([str(settings.bin), *old]),
    }


def run_on(
    settings: Settings, host: str, command: list[str], timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    """Runs a command on a host and returns its status and output.

    Raises:
        PipelineError: The host is down, or the command did not end in time.
    """
    try:
        return subprocess.run(
            enter(settings, host, command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise PipelineError(f"{host}: `{' '.join(command)}` did not end in {timeout_s:g} s") from error


def start_daemon(settings: Settings, host: str, command: list[str], log: Path) -> None:
    """Starts a command on a host that outlives this process; appends its output to `log`."""
    with log.open("ab") as out:
        subprocess.run(
            enter(settings, host, ["setsid", "--fork", *command]),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=True,
        )  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float, what: str, log: Path | None = None) -> None:
    """Waits until the condition holds.

    Raises:
        PipelineError: It did not hold in time; the message ends with the last lines of `log`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise PipelineError(f"no {what} within {seconds:g} s{chr(10) + tail(log) if log else ''}")
        time.sleep(0.05)


def tail(log: Path) -> str:
    """Returns the last lines of a log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join([f"{log}:", *text.splitlines()[-8:]])


def _wire(settings: Settings, host: str, pid: int) -> None:
    address = f"address add {settings.address(host)}/24 dev"
    # The other hosts remember a card's address; with a random new one they would wait 10 s and more for their old one.
    card = f"address {settings.hardware_address(host)}"
    if host == LOGIN:
        # A bridge without an address of its own takes one from its cables, and another when that cable is gone.
        _ip(pid, ["link set lo up", f"link add br0 {card} type bridge", f"{address} br0", "link set br0 up"])
        return
    login = pid_of(settings, LOGIN)
    if login is None:
        raise PipelineError(f"host {LOGIN} is down: `pipeline devcluster down`, then `up`")
    # The kernel removes the cable of a dead host, but with a delay.
    with contextlib.suppress(PipelineError):
        _ip(login, [f"link delete {host}"])
    _ip(login, [f"link add {host} type veth peer name eth0 netns {pid}", f"link set {host} master br0 up"])
    _ip(pid, ["link set lo up", f"link set eth0 {card}", f"{address} eth0", "link set eth0 up"])


def _ip(pid: int, lines: list[str]) -> None:
    """Runs commands of `ip -batch` in the network namespace of a host."""
    done = subprocess.run(
        ["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, errors="replace", timeout=10,
    )  # fmt: skip
    if done.returncode != 0:
        raise PipelineError(f"ip: {done.stderr.strip()}")


def remove_cgroups(host: str) -> None:
    """Removes the control groups of a name, which slurmd left: a machine without power has none."""
    for root in CGROUPS.glob(f"*/slurm_{host}"):
        for folder, _, _ in os.walk(root, topdown=False):
            wait_for(lambda f=folder: _rmdir(f), _END_S, f"end of the processes in {folder}")  # type: ignore[misc]


def _rmdir(folder: str) -> bool:
    try:
        Path(folder).rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _start_time(pid: int) -> str:
    """Returns when a process started, in clock ticks after boot; empty if it does not exist or is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The name, in brackets, may contain anything; the state follows it and, 19 fields later, the time.
    fields = stat[stat.rindex(")") + 2 :].split()
    return "" if fields[0] in "ZX" else fields[19]


def _pid_file(settings: Settings, host: str) -> Path:
    return settings.state / "run" / f"{host}.host"


def _log(settings: Settings, host: str) -> Path:
    return settings.logs / f"host.{host}.log"
