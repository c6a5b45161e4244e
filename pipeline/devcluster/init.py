"""The first process of a host: sets up the namespaces it was started in like a machine, then reaps orphans.

It runs as a file in a bare interpreter, so it imports nothing of the project. When it is killed, the kernel kills every
process of the host at once, as a power failure would.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def mount(*args: str) -> None:
    """Mounts a file system in this host only."""
    subprocess.run(["mount", *args], check=True)


def main(host: str, hosts_file: str, private: list[str], ready: int) -> None:
    """Sets up the host, writes its process id on the machine to the descriptor `ready`, and reaps orphans."""
    # /proc is still the machine's own here.
    outer_pid = Path("/proc/self").readlink()
    socket.sethostname(host)
    mount("-t", "proc", "proc", "/proc")
    mount("--bind", hosts_file, "/etc/hosts")
    for folder in private:
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder)
    # A signal that is sent to a whole process tree must not end the host.
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
