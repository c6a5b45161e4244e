"""Each kind of bad folder of open weights gives one message that names the place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.huggingface.model_folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from pipeline.huggingface.safetensors_header import MAX_HEADER
from tests.huggingface.folders import change_tensors, written
from tests.huggingface.test_open_weights import MODEL, opened


def no_config(folder: Path) -> str:
    (folder / CONFIG).unlink()
    return CONFIG


def broken_config(folder: Path) -> str:
    (folder / CONFIG).write_text("{")
    return CONFIG


def no_tokenizer(folder: Path) -> str:
    (folder / TOKENIZER).unlink()
    return TOKENIZER


def no_weights(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return WEIGHTS


def only_pickle(folder: Path) -> str:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    return "save_pretrained"


def unknown_architecture(folder: Path) -> str:
    tree = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**tree, "architectures": ["GPT2LMHeadModel"]}))
    return "GPT2LMHeadModel.*Qwen3ForCausalLM"


def missing_tensor(folder: Path) -> str:
    change_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"))
    return "layers.1.self_attn.q_proj.bias"


def extra_tensor(folder: Path) -> str:
    change_tensors(folder, lambda t: t.update({"model.layers.7.extra.weight": torch.ones(2)}))
    return "layers.7.extra.weight"


def wrong_shape(folder: Path) -> str:
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    return r"model.norm.weight.*47.*48"


def wrong_dtype(folder: Path) -> str:
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.float64)}))
    return "F64"


def not_a_number(folder: Path) -> str:
    change_tensors(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].fill_(torch.nan))
    return "mlp.up_proj.weight"


def infinite(folder: Path) -> str:
    change_tensors(folder, lambda t: t["model.embed_tokens.weight"][96, 47].fill_(torch.inf))
    return "embed_tokens"


def truncated(folder: Path) -> str:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-4])
    return WEIGHTS


def longer(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0")
    return WEIGHTS


def empty(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes(b"")
    return WEIGHTS


def absurd_header(folder: Path) -> str:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + content[8:])
    return WEIGHTS


def header_is_no_object(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]")
    return WEIGHTS


def overlapping(folder: Path) -> str:
    """Two tensors in the same bytes."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * 4)
    return WEIGHTS


def metadata_of_numbers(folder: Path) -> str:
    return with_header(folder, lambda header: {**header, "__metadata__": {"step": 1}})


def unreadable_to_the_library(folder: Path) -> str:
    """A header that the library refuses and that this project's own reading does not."""
    with_header(folder, lambda header: {**header, "__metadata__": []})
    return f"{WEIGHTS}: cannot be read"


def with_header(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    encoded = json.dumps(edit(json.loads(content[8:end]))).encode()
    (folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])
    return WEIGHTS


def index(folder: Path, content: object) -> str:
    (folder / INDEX).write_text(json.dumps(content))
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    return INDEX


def index_outside(folder: Path) -> str:
    return index(folder, {"weight_map": {"lm_head.weight": "../model.safetensors"}})


def index_absolute(folder: Path) -> str:
    return index(folder, {"weight_map": {"lm_head.weight": str(folder / "other.safetensors")}})


def index_of_a_name_with_a_null(folder: Path) -> str:
    return index(folder, {"weight_map": {"lm_head.weight": "other\0.safetensors"}})


def index_of_two_copies(folder: Path) -> str:
    shutil.copy(folder / WEIGHTS, folder / "copy.safetensors")
    index(folder, {"weight_map": {"lm_head.weight": "other.safetensors", "model.norm.weight": "copy.safetensors"}})
    return r"other.safetensors: holds .*copy.safetensors"


def index_without_map(folder: Path) -> str:
    return index(folder, [])


def index_of_a_missing_file(folder: Path) -> str:
    index(folder, {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    return "model-00001-of-00002.safetensors"


def linked_out(folder: Path, name: str) -> str:
    """Another file of the user in the place of one of the folder's."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    return f"{name}.*link"


def linked_config(folder: Path) -> str:
    return linked_out(folder, CONFIG)


def linked_tokenizer(folder: Path) -> str:
    return linked_out(folder, TOKENIZER)


def linked_weights(folder: Path) -> str:
    return linked_out(folder, WEIGHTS)


def weights_that_never_come(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return f"{WEIGHTS}.*regular"


def nested_config(folder: Path) -> str:
    (folder / CONFIG).write_text("[" * 100_000)
    return CONFIG


BAD_FOLDERS = (
    no_config, broken_config, no_tokenizer, no_weights, only_pickle, unknown_architecture, missing_tensor, extra_tensor,
    wrong_shape, wrong_dtype, not_a_number, infinite, truncated, longer, empty, absurd_header, header_is_no_object,
    overlapping, metadata_of_numbers, unreadable_to_the_library, index_outside,
    index_of_a_name_with_a_null, index_absolute, index_without_map, index_of_a_missing_file,
    index_of_two_copies, linked_config, linked_tokenizer, linked_weights, weights_that_never_come, nested_config,
)  # fmt: skip


@pytest.mark.parametrize("spoil", BAD_FOLDERS)
def test_a_bad_folder_gives_one_message_that_names_the_place(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    folder = tmp_path / "model"
    written(folder, MODEL)
    words = spoil(folder)
    with pytest.raises(UsageError, match=f"(?s){words}") as refused:
        opened(folder)
    assert str(folder) in str(refused.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    written(tmp_path, MODEL)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(8 + MAX_HEADER + 1)  # a sparse file
    with pytest.raises(UsageError, match=WEIGHTS):
        opened(tmp_path)
