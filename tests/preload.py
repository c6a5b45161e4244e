"""Imports for the process that ranks are forked from; starts no threads, because they would not survive a fork."""

from __future__ import annotations

import os
import warnings

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true")
warnings.simplefilter("ignore", FutureWarning)

import pytest  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - every optimizer imports it, which takes a second

import pipeline.cli.main  # noqa: E402
import pipeline.data.build.display  # noqa: E402
import pipeline.train.loop  # noqa: E402, F401
from pipeline.train.engine.deepspeed_setup import _import_without_mlflow  # noqa: E402

_import_without_mlflow()
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402 - it imports all of inductor, which takes two seconds
import deepspeed.runtime.zero.stage3  # noqa: E402, F401

# Inductor sets it as soon as it is imported, and training would take that for the user's choice.
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
torch.set_num_threads(1)
