"""A folder of open weights is read in any parts, and checked against the model of the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError
from pipeline.huggingface.model_folder import TOKENIZER
from pipeline.huggingface.open_weights import OpenWeights
from tests.huggingface.folders import change_tensors, written
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
        change_tensors(tmp_path, lambda t, table=table: t.update(table))
        assert opened(tmp_path)


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    written(tmp_path, TIED)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert opened(tmp_path, TIED)
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        opened(tmp_path, TIED)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(3, 48)}))
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        opened(tmp_path, TIED)
    change_tensors(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
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
