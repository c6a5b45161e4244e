"""Our scores are those of the harness's own model on the exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.export import export_run
from pipeline.run.evaluations import evaluations
from pipeline.run.folder import Run
from tests.data.helpers import command
from tests.evaluate.conftest import Save

NAMES = ("choice", "rolling", "generation")


@pytest.mark.slow
def test_likelihoods_texts_and_scores_equal_those_of_hugging_face(run: Run, save: Save, tasks: Path):
    save(3)
    ours, theirs = Recorded(), Recorded()
    import pipeline.evaluate.language_model as module

    with pytest.MonkeyPatch.context() as patch:
        ours.watch(patch, module.CheckpointLM)
        arguments = ["evaluate", str(run.path), "--tasks", ",".join(NAMES), "--include-path", str(tasks)]
        assert command(*arguments) == 0
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(list(NAMES))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    with pytest.MonkeyPatch.context() as patch:
        theirs.watch(patch, HFLM)
        patch.delenv("LOCAL_RANK", raising=False)  # a training in this process may have set it: they would join a group
        model = HFLM(str(export_run(run, "hf")), device="cpu", batch_size=8)
        expected = evaluator.evaluate(model, loaded, log_samples=True)

    assert len(ours.likelihoods) == len(theirs.likelihoods) == 96
    for (logprob, greedy), (their_logprob, their_greedy) in zip(ours.likelihoods, theirs.likelihoods, strict=True):
        assert logprob == pytest.approx(their_logprob, abs=1e-3) and greedy == their_greedy
    assert ours.rolling == pytest.approx(theirs.rolling, abs=1e-3) and len(ours.rolling) == 12
    assert ours.texts == theirs.texts and len(set(ours.texts)) > 3 and not any("e" in text for text in ours.texts)
    for found in evaluations(run):
        name = found["name"]
        scores = found["tasks"][name]
        for metric, value in scores["metrics"].items():
            wanted = expected["results"][name]
            assert value["value"] == pytest.approx(wanted[f"{metric},none"], rel=1e-4)
            if metric in ("acc", "acc_norm", "exact_match"):
                assert value["value"] == wanted[f"{metric},none"]
                assert value["stderr"] == wanted[f"{metric}_stderr,none"]
        assert scores["hash"] == their_hash(expected["samples"][name])


def their_hash(samples: list[dict[str, Any]]) -> str:
    """The digest that the harness writes as `task_hashes`."""
    from lm_eval.utils import hash_string

    return hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))


class Recorded:
    """What a model answered."""

    def __init__(self) -> None:
        self.likelihoods: list[tuple[float, bool]] = []
        self.rolling: list[float] = []
        self.texts: list[str] = []

    def watch(self, patch: pytest.MonkeyPatch, model: type) -> None:
        for name, kept in (
            ("loglikelihood", self.likelihoods),
            ("loglikelihood_rolling", self.rolling),
            ("generate_until", self.texts),
        ):
            patch.setattr(model, name, self._recording(getattr(model, name), kept))

    @staticmethod
    def _recording(answer: Any, kept: list[Any]) -> Any:
        def recorded(self: Any, requests: Any, **options: Any) -> Any:
            answers = answer(self, requests, **options)
            kept.extend(answers)
            return answers

        return recorded
