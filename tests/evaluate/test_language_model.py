"""Texts are read as in training, whatever the model was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.evaluate.generation import Prompt, Settings, generate_batch
from pipeline.evaluate.language_model import CheckpointLM
from pipeline.model.generate import generate
from pipeline.model.transformer import TransformerLM
from tests.evaluate.conftest import CONTEXT


@pytest.fixture(scope="module")
def tokenizer(template: Path) -> Tokenizer:
    return Tokenizer.load(template / "tokens" / "tokenizer.json")


def drawn(document_mask: bool) -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(257, CONTEXT, 32, 2, 4, 64, 1e4, document_mask=document_mask)
    for parameter in model.parameters():
        parameter.data *= 2
    return model.eval()


def request(*arguments: object) -> object:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_text_begins_behind_the_end_of_a_document_as_in_training(tokenizer: Tokenizer, document_mask: bool):
    model, text = drawn(document_mask), "war and peace"
    end, ids = tokenizer.end_of_text_id, tokenizer.encode(text)
    row = torch.tensor([[end, *ids]])
    # In training the end belongs to the document before: the text sees itself only.
    starts = torch.tensor([[0, *[1] * len(ids)]]) if document_mask else None
    with torch.no_grad():
        logprobs = model(row[:, :-1], document_starts=starts if starts is None else starts[:, :-1])[0].log_softmax(-1)
    expected = float(logprobs[torch.arange(len(ids)), row[0, 1:]].sum())
    lm = CheckpointLM(model, tokenizer)
    assert lm.loglikelihood_rolling([request(text)]) == [pytest.approx(expected, abs=1e-3)]
    assert lm.loglikelihood([request("", text)])[0][0] == pytest.approx(expected, abs=1e-3)
    # White space before a text is part of it, as for the harness's own models; nothing else is left of this context.
    assert lm.loglikelihood([request(" ", text)]) == lm.loglikelihood([request("", f" {text}")])


def test_the_text_of_a_special_token_is_text(tokenizer: Tokenizer):
    lm = CheckpointLM(drawn(False), tokenizer)
    assert tokenizer.end_of_text_id not in lm.tok_encode(f"war{tokenizer.end_of_text}peace")


def test_texts_of_a_batch_are_those_of_each_prompt_alone(tokenizer: Tokenizer):
    model, settings = drawn(False), Settings((), 20, 0.0, 1.0)
    prompts = [Prompt(n, tuple(tokenizer.encode("war and peace"[: 2 * n + 1])), settings) for n in range(5)]
    for number, text in generate_batch(model, tokenizer, prompts):
        alone = generate(model, prompts[number].tokens, 20, 0.0, stop_id=tokenizer.end_of_text_id)
        assert text == tokenizer.decode(alone)


def test_a_drawn_text_does_not_depend_on_its_batch(tokenizer: Tokenizer):
    model, settings = drawn(False), Settings((), 12, 1.0, 0.9)
    prompts = [Prompt(n, tuple(tokenizer.encode("peace " * (n % 2 + 1))), settings) for n in range(4)]
    texts = dict(generate_batch(model, tokenizer, prompts))
    assert generate_batch(model, tokenizer, prompts[2:3]) == [(2, texts[2])]
    assert texts[0] != texts[2]  # the same prompt, drawn again
