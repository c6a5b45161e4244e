"""Text from a trained run."""

from __future__ import annotations

import torch

from pipeline.checkpoint.read import newest_checkpoint
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.model.generate import generate
from pipeline.run.folder import Run
from pipeline.train.model import load_model


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
    model = load_model(config, checkpoint)
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
