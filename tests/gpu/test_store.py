"""NCCL over the store of the ranks: PyTorch's threads ask it too, while the group lives and as it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = """
import time
from datetime import timedelta
import torch
import torch.distributed as dist
from pipeline.train.ranks.store import HostedStore, RemoteStore
limit = timedelta(seconds=60)
host = HostedStore(0, b"secret", 2, limit)
store = RemoteStore("127.0.0.1", host.port, b"secret", 1, limit)
torch.cuda.set_device(0)
dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=limit)
for group in (None, dist.new_group([0])):
    ones = torch.ones(1000, device="cuda")
    dist.all_reduce(ones, group=group)
    assert int(ones.sum()) == 1000
time.sleep(5)  # NCCL's monitor looks into the store every second
began = time.monotonic()
dist.destroy_process_group()
store.close()
host.close()
assert time.monotonic() - began < 10
print("ended")
"""


def test_nccl_trains_over_the_store_and_ends() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ended", done.stderr
