"""Imports for the process that ranks are forked from; starts no threads, because they would not survive a fork."""

from __future__ import annotations

import os
import warnings

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true")
warnings.simplefilter("ignore", FutureWarning)

import pytest  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - stage 3 of DeepSpeed imports it, and so does whatever is compiled

import pipeline.cli.main  # noqa: E402
import pipeline.data.build.display  # noqa: E402
import pipeline.train.loop  # noqa: E402, F401
from pipeline.train.engine.deepspeed_setup import _without, _without_compiler  # noqa: E402

with _without("mlflow"), _without_compiler():
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3  # noqa: F401
# A test that compiled may have set it before; training would take it for the user's choice.
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
torch.set_num_threads(1)
