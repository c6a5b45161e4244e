"""Measures tasks by our model against lm-evaluation-harness's own model on the exported folder, on one thread of a CPU.

The model has 10M parameters and a vocabulary of 4,096 tokens; the tasks are made of the demo's text (`make demo`).

python -m benchmarks.evaluation
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleaved, refuse_arguments, save
from pipeline.evaluate.harness import start_harness

ROUNDS = 3
BATCH = 16
MODEL = {"context_length": 512, "d_model": 256, "num_layers": 8, "num_heads": 8, "d_ff": 688}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
KINDS = {
    "four endings of one context": CHOICE,
    "four letters": CHOICE,
    "perplexity of texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "texts of 64 tokens": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["zzzz"], max_gen_toks: 64}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def rows(kind: str, words: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """The documents of a task."""

    def text(least: int, most: int) -> str:
        start = rng.randrange(len(words) - most)
        return " ".join(words[start : start + rng.randint(least, most)])

    def choice(endings: Callable[[], list[str]]) -> dict[str, Any]:
        return {"context": text(40, 160), "choices": endings(), "answer": rng.randrange(4)}

    match kind:
        case "four endings of one context":
            return [choice(lambda: [text(8, 20) for _ in range(4)]) for _ in range(40)]
        case "four letters":
            return [choice(lambda: list("ABCD")) for _ in range(80)]
        case "perplexity of texts":
            return [{"text": text(100, 800)} for _ in range(30)]
    return [{"text": text(20, 160)} for _ in range(32)]


def main() -> None:
    refuse_arguments(__doc__)
    torch.set_num_threads(1)
    start_harness(fetching=False)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pipeline.checkpoint.read import newest_checkpoint
    from pipeline.commands.export import export_run
    from pipeline.data.tokenize.tokenizer import Tokenizer
    from pipeline.evaluate.language_model import CheckpointLM
    from pipeline.run.folder import open_run
    from pipeline.train.model import load_model

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [f"model.{key}={value}" for key, value in MODEL.items()]
        settings += [f"runs_dir={folder}/runs", f"data.path={folder}/tokens", "tracking.uri=none", "train.max_iters=2"]
        settings += ["train.batch_size=2", "train.micro_batch_size=2", "optimizer.warmup_iters=0"]
        settings += ["optimizer.cosine_cycle_iters=2", "train.device=cpu"]
        for command in ("prepare", "train"):
            argv = [sys.executable, "-m", "pipeline", command, "configs/demo.yaml", *settings]
            subprocess.run(argv, check=True, capture_output=True)
        run = open_run(folder / "runs" / "demo")
        checkpoint = newest_checkpoint(run.checkpoints)
        tokenizer = Tokenizer.load(run.tokenizer_file)
        model = load_model(run.config(), checkpoint)
        models = {
            "ours": CheckpointLM(model, tokenizer),
            "lm_eval --model hf": HFLM(str(export_run(run, "hf")), device="cpu", batch_size=BATCH),
        }
        words = Path("data/demo/text/train/1910-Taft-1.txt").read_text().split()
        for number, (kind, rest) in enumerate(KINDS.items()):
            data = folder / f"task{number}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, words, random.Random(number))))
            (folder / f"task{number}.yaml").write_text(TASK.format(name=f"task{number}", data=data, rest=rest))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        for number, kind in enumerate(KINDS):
            loaded = manager.load([f"task{number}"])
            loaded["tasks"][f"task{number}"].set_fewshot_seed(seed=1234)
            ask = functools.partial(evaluator.evaluate, task_dict=loaded, bootstrap_iters=0, log_samples=False)
            seconds = interleaved({way: functools.partial(ask, lm) for way, lm in models.items()}, ROUNDS)
            found[kind] = {way: round(time, 3) for way, time in seconds.items()}
    save("evaluation", {"batch of lm_eval": BATCH, "seconds": found})


if __name__ == "__main__":
    main()
