"""The first process of a host: makes the namespaces it was started in look like a machine, then reaps orphans.

Run as a file by the bare interpreter, so it imports nothing of the project. When it is killed, the kernel kills every
process of the host at once: that is a power failure.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def mount(*args: str) -> None:
    """Mounts, in this host only."""
    subprocess.run(["mount", *args], check=True)


def main(host: str, hosts_file: str, private: list[str], ready: int) -> None:
    """Never returns; writes its process id, as the machine sees it, to the descriptor `ready`."""
    # /proc is still the machine's own here.
    outer_pid = Path("/proc/self").readlink()
    socket.sethostname(host)
    mount("-t", "proc", "proc", "/proc")
    mount("--bind", hosts_file, "/etc/hosts")
    for folder in private:
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder)
    # Whatever is sent to whole process trees must not take the host down.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.write(ready, f"{outer_pid}\n".encode())
    os.close(ready)
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
        except ChildProcessError:
            continue


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[4:], int(sys.argv[3]))
