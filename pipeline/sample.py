"""Text from a trained run."""

from __future__ import annotations

import torch

from pipeline.checkpoint.export import load_weights
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.config import ModelConfig
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.model.generate import generate
from pipeline.model.transformer import TransformerLM
from pipeline.run import Run


def build_model(config: ModelConfig) -> TransformerLM:
    """A model of this shape with fresh weights, on the CPU."""
    return TransformerLM(**config.model_dump())


def sample_run(run: Run, prompt: str | None = None, count: int = 1, seed: int = 0) -> list[str]:
    """Texts from the newest checkpoint, prompt included; also written to the run folder.

    Args:
        run: The run.
        prompt: How a text begins; None takes the config's.
        count: Number of texts.
        seed: The same seed gives the same texts.

    Raises:
        UsageError: The prompt is empty.
        CheckpointError: There is no checkpoint that can be trusted.
    """
    config = run.config()
    prompt = config.sample.prompt if prompt is None else prompt
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokenizer.end_of_text)
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise UsageError("the prompt is empty; give at least one character")
    checkpoint = newest_checkpoint(run.checkpoints)
    model = build_model(config.model)
    model.load_state_dict(load_weights(checkpoint))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    texts = []
    for _ in range(count):
        settings = config.sample
        new = generate(
            model, prompt_ids, settings.max_new_tokens, settings.temperature, settings.top_p,
            tokenizer.end_of_text_id, generator,
        )  # fmt: skip
        texts.append(tokenizer.decode([*prompt_ids, *new]))
    write_text(run.samples / f"{checkpoint.name}.txt", "\n\n".join(texts) + "\n")
    return texts
