"""The device as training sets it up, in a process of its own: PyTorch reads its settings once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = """
import json, os, sys
for name in [n for n in os.environ if n.endswith("_ALLOC_CONF")]:
    del os.environ[name]
os.environ.update(json.loads(sys.argv[1]))
import torch
from pipeline.config.load import load_config
from pipeline.run.world import World
from pipeline.train.ranks.device import peak_flops_per_s, pick_device
device = pick_device(load_config("configs/demo.yaml", ["train.device=cuda"]), World())
held = torch.empty(1 << 25, device=device)
expandable = {s["is_expandable"] for s in torch.cuda.memory_snapshot()}
print(json.dumps([sorted(expandable), peak_flops_per_s(device, "bf16"), torch.cuda.get_device_name(device)]))
"""


@pytest.mark.parametrize(
    ("set_by_user", "expandable"),
    [({}, [True]), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, [False])],
)
def test_segments_are_expandable_unless_the_user_set_up_the_allocator(
    set_by_user: dict[str, str], expandable: list[bool]
) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(set_by_user)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, peak, name = json.loads(done.stdout.splitlines()[-1])
    assert found == expandable
    assert peak is None or peak > 1e13, name
