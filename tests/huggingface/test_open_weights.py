"""A folder of open weights is read in any parts, and each kind of bad folder gives one message that names the place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError
from pipeline.huggingface.model_folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.huggingface.safetensors_header import MAX_HEADER
from tests.huggingface.folders import written
from tests.model.test_transformer import SHAPE

MODEL = ModelConfig(**SHAPE, num_kv_heads=2, qkv_bias=True, norm_eps=1e-6)
TIED = MODEL.model_copy(update={"tie_embeddings": True})
NORMED = ModelConfig(**SHAPE, head_dim=16, qk_norm=True)


def opened(folder: Path, model: ModelConfig = MODEL) -> str:
    """Makes every check of a folder and returns its digest."""
    weights = OpenWeights(folder, model)
    return weights.digest({file.name: weights.check_values(file) for file in weights.files})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model", "files"), [(MODEL, 1), (NORMED, 3)], ids=["biased", "normed"])
def test_any_part_of_any_parameter_is_that_of_the_whole(
    tmp_path: Path, model: ModelConfig, files: int, dtype: torch.dtype
) -> None:
    ours = written(tmp_path, model, files, dtype)
    weights = OpenWeights(tmp_path, model)
    for name, parameter in ours.named_parameters():
        whole = parameter.detach().view(-1)
        for start, length in [(0, len(whole)), (1, 1), (5, 7), (len(whole) // 3, len(whole) // 2), (len(whole) - 1, 1)]:
            out = torch.full((length,), torch.nan)
            weights.read("weight", name, start, out)
            assert torch.equal(out, whole[start : start + length]), (name, start)


def test_the_digest_names_the_content_and_not_the_place(tmp_path: Path) -> None:
    written(tmp_path / "a", MODEL, files=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert opened(tmp_path / "a") == opened(tmp_path / "b")
    (tmp_path / "b" / TOKENIZER).write_text('{"another": 1}')
    assert opened(tmp_path / "a") != opened(tmp_path / "b")


def test_a_shorter_or_longer_context_is_allowed_and_another_model_is_not(tmp_path: Path) -> None:
    written(tmp_path, MODEL)
    assert opened(tmp_path, MODEL.model_copy(update={"context_length": 8}))
    for change in ({"d_ff": 32}, {"norm_eps": 1e-5}, {"num_kv_heads": None}, {"rope_theta": 5.0}):
        with pytest.raises(UsageError, match=rf"model\.{next(iter(change))}"):
            OpenWeights(tmp_path, MODEL.model_copy(update=change))


def test_tables_that_follow_from_the_config_are_ignored(tmp_path: Path) -> None:
    written(tmp_path, MODEL)
    for shape in ((6,), (4, 0), (0, 4), ()):
        table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(shape)}
        change(tmp_path, lambda t, table=table: t.update(table))
        assert opened(tmp_path)


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    written(tmp_path, TIED)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert opened(tmp_path, TIED)
    change(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        opened(tmp_path, TIED)
    change(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(3, 48)}))
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        opened(tmp_path, TIED)
    change(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(UsageError, match="embed_tokens"):
        opened(tmp_path, TIED)


class Slice:
    """Notes the rows that are asked for."""

    def __init__(self, source: Any, asked: list[tuple[int, int]]) -> None:
        self._source, self._asked = source, asked

    def get_shape(self) -> list[int]:
        return self._source.get_shape()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        self._asked.append((rows.start, rows.stop))
        return self._source[rows]


@pytest.mark.parametrize(("name", "rows"), [("ffn.w1.weight", (10, 13)), ("attn.q_proj.weight", (0, 24))])
def test_a_part_is_read_by_its_rows_or_by_whole_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: tuple[int, int]
) -> None:
    written(tmp_path, MODEL)
    weights, asked, plain = OpenWeights(tmp_path, MODEL), list[tuple[int, int]](), OpenWeights._slice
    monkeypatch.setattr(OpenWeights, "_slice", lambda self, name: Slice(plain(self, name), asked))
    weights.read("weight", f"layers.0.{name}", 10 * 48 + 1, torch.empty(2 * 48))
    assert asked == [rows]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder's only file."""
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


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
    change(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"))
    return "layers.1.self_attn.q_proj.bias"


def extra_tensor(folder: Path) -> str:
    change(folder, lambda t: t.update({"model.layers.7.extra.weight": torch.ones(2)}))
    return "layers.7.extra.weight"


def wrong_shape(folder: Path) -> str:
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    return r"model.norm.weight.*47.*48"


def wrong_dtype(folder: Path) -> str:
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.float64)}))
    return "F64"


def not_a_number(folder: Path) -> str:
    change(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].fill_(torch.nan))
    return "mlp.up_proj.weight"


def infinite(folder: Path) -> str:
    change(folder, lambda t: t["model.embed_tokens.weight"][96, 47].fill_(torch.inf))
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
