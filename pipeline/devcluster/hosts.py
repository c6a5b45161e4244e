"""Hosts: namespaces with an address and a name of their own, joined by a bridge that lives in the login host."""

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

from pipeline.devcluster.settings import LOGIN, Settings
from pipeline.errors import PipelineError
from pipeline.files import write_text

NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc")
_START_S = 10.0
_END_S = 10.0


def start_host(settings: Settings, host: str) -> None:
    """Starts a host and joins it to the network.

    Raises:
        PipelineError: It did not come up; the message ends with what it said.
    """
    private = [str(settings.database)] if host == LOGIN else ["/tmp", "/dev/shm"]
    init = [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py"))]
    reader, writer = os.pipe()
    try:
        with _log(settings, host).open("ab") as log:
            # setsid lets go of it: it outlives this command, and nobody here has to reap it.
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
    """Cuts the power: the kernel kills every process of the host at once. Does nothing to a host that is down."""
    pid = pid_of(settings, host)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid_of(settings, host) is None, _END_S, f"the end of host {host}")
    _pid_file(settings, host).unlink(missing_ok=True)
    _remove_cgroups(host)


def pid_of(settings: Settings, host: str) -> int | None:
    """Process id of a host's first process, as the machine sees it; None if the host is down."""
    try:
        pid, start = _pid_file(settings, host).read_text().split()
    except FileNotFoundError:
        return None
    # The number alone may belong to another process by now.
    return int(pid) if _start_time(int(pid)) == start else None


def enter(settings: Settings, host: str, command: list[str]) -> list[str]:
    """The command line that runs `command` on a host, in the folder it is started from, with Slurm's clients on PATH.

    Raises:
        PipelineError: The host is down.
    """
    pid = pid_of(settings, host)
    if pid is None:
        raise PipelineError(f"host {host} is down")
    # `env` changes the folder when it is inside: nsenter's own --wd keeps one of the old mounts.
    inside = [f"--chdir={Path.cwd()}", *(f"{name}={value}" for name, value in environment(settings).items())]
    return ["nsenter", "--target", str(pid), *NAMESPACES, "--", "env", *inside, *command]


def environment(settings: Settings) -> dict[str, str]:
    """The variables that lead a shell, and everything it starts, to this cluster."""
    old = [folder for folder in os.environ.get("PATH", os.defpath).split(":") if folder != str(settings.bin)]
    return {
        "PIPELINE_DEVCLUSTER": str(settings.state),
        "SLURM_CONF": str(settings.conf),
        "PATH": ":".join([str(settings.bin), *old]),
    }


def run_on(
    settings: Settings, host: str, command: list[str], timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    """Runs a command on a host and returns what it said.

    Raises:
        PipelineError: The host is down, or the command did not end in time.
    """
    try:
        return subprocess.run(
            enter(settings, host, command), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise PipelineError(f"{host}: `{' '.join(command)}` did not end in {timeout_s:g} s") from error


def start_daemon(settings: Settings, host: str, command: list[str], log: Path) -> None:
    """Starts a command on a host that goes on after this one has ended; its output is appended to `log`."""
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
            raise PipelineError(f"waited {seconds:g} s in vain for {what}{chr(10) + tail(log) if log else ''}")
        time.sleep(0.05)


def tail(log: Path) -> str:
    """The last lines of a log."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join([f"{log}:", *text.splitlines()[-8:]])


def _wire(settings: Settings, host: str, pid: int) -> None:
    address = f"address add {settings.address(host)}/24 dev"
    if host == LOGIN:
        _ip(pid, ["link set lo up", "link add br0 type bridge", f"{address} br0", "link set br0 up"])
        return
    login = pid_of(settings, LOGIN)
    if login is None:
        raise PipelineError(f"host {LOGIN} is down: `pipeline devcluster down`, then `up`")
    # The kernel takes a dead host's cable away, but in its own time.
    with contextlib.suppress(PipelineError):
        _ip(login, [f"link delete {host}"])
    _ip(login, [f"link add {host} type veth peer name eth0 netns {pid}", f"link set {host} master br0 up"])
    _ip(pid, ["link set lo up", f"{address} eth0", "link set eth0 up"])


def _ip(pid: int, lines: list[str]) -> None:
    """Runs lines of `ip -batch` in the network of a host."""
    done = subprocess.run(
        ["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=10,
    )  # fmt: skip
    if done.returncode != 0:
        raise PipelineError(f"ip: {done.stderr.strip()}")


def _remove_cgroups(host: str) -> None:
    """Takes away what slurmd left: a machine that lost its power has no control groups."""
    for root in Path("/sys/fs/cgroup").glob(f"*/slurm_{host}"):
        for folder, _, _ in os.walk(root, topdown=False):
            wait_for(lambda f=folder: _rmdir(f), _END_S, f"the last process in {folder}")  # type: ignore[misc]


def _rmdir(folder: str) -> bool:
    try:
        Path(folder).rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _start_time(pid: int) -> str:
    """When a process began, in clock ticks after boot; empty if there is none or it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The name, in brackets, may hold anything; after it come the state and, 19 fields on, the time.
    fields = stat[stat.rindex(")") + 2 :].split()
    return "" if fields[0] in "ZX" else fields[19]


def _pid_file(settings: Settings, host: str) -> Path:
    return settings.state / "run" / f"{host}.host"


def _log(settings: Settings, host: str) -> Path:
    return settings.logs / f"host.{host}.log"
