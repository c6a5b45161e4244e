"""Starts the harness: without network unless data is to be fetched, quiet, and with templates that cannot run code."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec

from pipeline.errors import PackageMissing

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def start_harness(*, fetching: bool) -> str:
    """Imports the harness and returns its version; the first call of a process decides whether it may use the network.

    Raises:
        PackageMissing: It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise PackageMissing("lm_eval", "evaluate")
    for name in _OFFLINE:  # they are read at the import
        os.environ[name] = "0" if fetching else "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import lm_eval
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox
    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return str(lm_eval.__version__)
