"""A single file that holds a model, its optimizer and the iteration: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files import naming, write_bytes

Target = str | os.PathLike[str] | BinaryIO | IO[bytes]

_MODEL, _OPTIMIZER = "model/", "optimizer/"


def save_checkpoint(model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: Target) -> None:
    """Writes the state dicts of the model and the optimizer, and the iteration.

    Args:
        model: Any module.
        optimizer: Any optimizer whose state consists of tensors and plain values.
        iteration: Finished steps.
        out: A path, which is published whole, or a binary file object.

    Raises:
        CheckpointError: The state holds something that is neither a tensor nor a plain value.
    """
    tensors = {_MODEL + name: _stored(value) for name, value in model.state_dict().items()}
    state_dict = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, state in state_dict["state"].items():
        plain[str(index)] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{index}/{key}"] = _stored(value)
            else:
                plain[str(index)][key] = _to_json(value)
    about = {"iteration": iteration, "state": plain, "param_groups": _to_json(state_dict["param_groups"])}
    try:
        content = safetensors.torch.save(tensors, {"pipeline": json.dumps(about)})
    except TypeError as error:
        raise CheckpointError(f"the optimizer's state cannot be stored: {error}") from error
    if isinstance(out, (str, os.PathLike)):
        write_bytes(Path(out), content)
    else:
        out.write(content)


def load_checkpoint(src: Target, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_checkpoint` wrote.

    Args:
        src: A path or a binary file object.
        model: A module of the same shape.
        optimizer: An optimizer over the same parameters.

    Returns:
        The iteration.

    Raises:
        CheckpointError: The file cannot be read, or is not one that `save_checkpoint` wrote.
    """
    content = _read(src)
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["pipeline"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{src}: is damaged or not a checkpoint file of this program ({error})") from error
    model.load_state_dict({n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)})
    state = {int(index): _from_json(values) for index, values in about["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split("/", 1)
            state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": _from_json(about["param_groups"])})
    return int(about["iteration"])


def _read(src: Target) -> bytes:
    if not isinstance(src, (str, os.PathLike)):
        return src.read()
    with naming(os.fspath(src), "the checkpoint cannot be read", error=CheckpointError):
        return Path(src).read_bytes()


def _stored(tensor: Tensor) -> Tensor:
    # Cloned: safetensors rejects tensors that share memory, as tied weights do.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _to_json(value: Any) -> Any:
    # JSON has no tuples, and (0.9, 0.95) must not come back as [0.9, 0.95].
    if isinstance(value, tuple):
        return {"tuple": [_to_json(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _to_json(v) for k, v in value.items()}}
    return [_to_json(v) for v in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_from_json(v) for v in value["tuple"])
    inner = value.get("dict", value)
    return {k: _from_json(v) for k, v in inner.items()}
