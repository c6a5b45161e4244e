"""The dry runs that are compared with golden files; `python -m tests.launch.submit.dry_runs` rewrites the files."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import yaml

from pipeline.launch.submit.chain import plan_chain
from pipeline.launch.submit.summary import dry_run
from tests.launch.support import CONFIG, ROOT

GOLDEN = Path(__file__).parent / "golden"
_SITES = ROOT / "slurm" / "sites"

WSD = (
    "optimizer.schedule=wsd", "optimizer.cosine_cycle_iters=null", "optimizer.decay_iters=10",
    "train.checkpoint_interval=20",
)  # fmt: skip
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[int, ...]]] = {
    "cpu": ("cpu.yaml", (), (), ()),
    "decays": ("devcluster.yaml", WSD, (), (40, 80)),
    "devcluster": ("devcluster.yaml", (), (), ()),
    "gpu_in_container": ("gpu.yaml", ("container.image=image.sif", "train.batch_size=64"), (), ()),
    "sweep": ("devcluster.yaml", (), ("optimizer.learning_rate=1e-2,3e-3",), ()),
}


def render(case: str) -> str:
    """One dry run, in an empty folder, with what differs between machines replaced."""
    site, overrides, sweeps, decay_at = CASES[case]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
            Path("image.sif").touch()
            # `auto` looks at this machine, which may have a GPU or not.
            Path("site.yaml").write_text((_SITES / site).read_text().replace("gpu: auto ", "gpu: nv "))
            text = dry_run(plan_chain("config.yaml", "site.yaml", overrides, sweeps, decay_at=decay_at))
            assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "image.sif", "site.yaml"]
        finally:
            os.chdir(before)
    text = text.replace(str(folder), "/FOLDER").replace(sys.executable, "/venv/bin/python")
    text = re.sub(r"commit [0-9a-f]{12}( with changes)?$|no commit is known$", "commit COMMIT", text, flags=re.M)
    return text.replace(f"pipeline-cache-{os.getuid()}", "pipeline-cache-UID")


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.txt").write_text(render(case))
        print(f"wrote {GOLDEN / case}.txt")
