"""Sampling is greedy, seeded, cut by top-p and bounded as its arguments say."""

from __future__ import annotations

import pytest
import torch

from pipeline.model.generate import draw, generate
from pipeline.model.transformer import TransformerLM


def model(context_length: int = 16) -> TransformerLM:
    torch.manual_seed(3)
    return TransformerLM(50, context_length, 32, 2, 4, 64, 10000.0)


def test_temperature_zero_takes_the_likeliest_token_each_time():
    lm, prompt = model(), [1, 2, 3]
    expected = list(prompt)
    for _ in range(10):
        expected.append(int(lm(torch.tensor([expected]))[0, -1].argmax()))
    assert generate(lm, prompt, 10, temperature=0) == expected[3:]


def test_only_the_same_seed_gives_the_same_text():
    texts = [generate(model(), [1], 12, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_text_can_be_longer_than_the_context():
    assert len(generate(model(), list(range(40)), 50, temperature=0)) == 50


@pytest.mark.parametrize("context_length", [1, 2, 16])
def test_a_full_context_of_prompt_leaves_room_for_one_token(context_length):
    prompt = list(range(1, context_length + 1))
    counted = prompt[1:] or prompt
    lm = model(context_length)
    assert generate(lm, [*prompt, *prompt], 3, temperature=0) == generate(lm, counted, 3, temperature=0)


def test_the_stop_token_ends_the_text_and_is_not_returned():
    whole = generate(model(), [1], 12, temperature=0)
    stopped = generate(model(), [1], 12, temperature=0, stop_id=whole[5])
    assert stopped == whole[: whole.index(whole[5])]


def test_top_p_keeps_the_smallest_set_that_holds_the_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(logits, 1.0, 0.7, generator) for _ in range(300)}
    assert drawn == {0, 1}
    assert {draw(1e3 * logits, 1e-40, 1.0, generator) for _ in range(20)} == {0}, "dividing would give infinities"
    assert {draw(logits, 1.0, 0.01, generator) for _ in range(20)} == {0}
