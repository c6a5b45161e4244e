"""Our model as the harness sees a model: it answers requests for log-likelihoods and for texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.evaluate.generation import Prompt, Settings, generate_batch, prompt_batches
from pipeline.evaluate.scoring import Limits, Request, Score, batches, score
from pipeline.model.transformer import TransformerLM

B = TypeVar("B")
R = TypeVar("R")

Gather = Callable[[Any], list[Any]]


class CheckpointLM(TemplateLM):
    """The model of a checkpoint.

    Every rank holds all requests and computes every n-th batch; then all ranks have all answers. The harness would
    rather give each rank every n-th document: the examples that it draws for few-shot prompts, and with them the
    scores, would depend on the number of ranks.

    Text is encoded as for training: nothing is put before it, and the text of a special token is text. Where there is
    no context, the token that ends the document before is the context.

    Args:
        model: The model.
        tokenizer: The run's.
        rank: This process.
        size: Number of processes.
        gather: Returns the values of all ranks, in their order: values of JSON.
        advance: Is told how many requests this rank has answered since it was last told, and of how many.
    """

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: Tokenizer,
        rank: int = 0,
        size: int = 1,
        gather: Gather = lambda value: [value],
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokens = tokenizer
        self._share = (rank, size)
        self._gather = gather
        self._advance = advance
        self._vocab_size = model.token_embeddings.weight.shape[0]
        self._limits = Limits.of(model.device)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokens.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the tokens of a text; never a special one, whatever is asked for."""
        return self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns the scores of continuations; the harness would show a bar of its own."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the scores of `(texts, context, continuation)`; what is too long loses its beginning."""
        longest = self._model.context_length
        pieces: list[Request] = []
        owners: list[int] = []
        for owner, (texts, context, continuation) in enumerate(requests):
            behind = len(continuation)
            if not behind:
                raise UsageError(
                    f"a task asks for the likelihood of {texts[1][:60]!r} behind {texts[0][-60:]!r}, which adds no "
                    "token: correct its choices, or set target_delimiter to a space"
                )
            if behind > longest:
                raise UsageError(
                    f"a task asks for the likelihood of {behind} tokens at once, and the model's context holds "
                    f"{longest}; leave that task out"
                )
            # The harness counts the white space at the end of a context as part of what follows; nothing may be left.
            whole = [*(context or [self.eot_token_id]), *continuation][-(longest + 1) :]
            for before, after in self._pieces(tuple(whole[:-behind]), tuple(whole[-behind:])):
                pieces.append(Request(len(pieces), before, after))
                owners.append(owner)
        work = batches(pieces, longest, self._vocab_size, self._limits)
        sizes = [sum(len(row.requests) for group in batch.groups for row in group.rows) for batch in work]
        scores: dict[int, list[Score]] = defaultdict(list)
        for number, (logprob, is_greedy) in self._shared(work, sizes, lambda batch: score(self._model, batch)):
            scores[owners[number]].append(Score(logprob, is_greedy))
        return [
            (sum(s.logprob for s in found), all(s.is_greedy for s in found))
            for found in (scores[owner] for owner in range(len(requests)))
        ]

    def _pieces(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> list[tuple[Any, Any]]:
        """Returns the parts of a request that are scored by themselves: two, where a document mask cuts it.

        A model that was trained with one predicts the first token from the end of the document before, and the rest
        without it.
        """
        begins = context == (self.eot_token_id,) and len(continuation) > 1
        if not (begins and self._model.document_mask):
            return [(context, continuation)]
        return [(context, continuation[:1]), (continuation[:1], continuation[1:])]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows of the model's context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            made = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.context_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in made]
            counts.append(len(pairs))
            windows += [(None, *pair) for pair in pairs]
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the texts that continue the contexts."""
        context_length = self._model.context_length
        prompts = []
        for number, request in enumerate(requests):
            text, given = request.args
            settings = Settings.of(given, request.task_name or "?", context_length)
            tokens = self.tok_encode(text)[-(context_length - settings.max_tokens) :] or [self.prefix_token_id]
            prompts.append(Prompt(number, tuple(tokens), settings))
        work = prompt_batches(prompts, self._vocab_size, self._limits)
        found = self._shared(work, list(map(len, work)), lambda b: generate_batch(self._model, self._tokens, b))
        return [text for _, text in sorted(found)]

    def _shared(self, work: list[B], sizes: list[int], do: Callable[[B], list[tuple[int, R]]]) -> list[tuple[int, R]]:
        """Returns the answers to all batches, of which each rank computes its share."""
        rank, size = self._share
        mine: list[tuple[int, R]] = []
        for batch, count in list(zip(work, sizes, strict=True))[rank::size]:
            mine += do(batch)
            self._advance(count, sum(sizes[rank::size]))
        return [(number, answer) for answers in self._gather(mine) for number, answer in answers]
