"""What lm-eval's Hugging Face model and ours for vLLM have in common: how they are asked about facts."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Set

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from retention_bench.errors import RetentionBenchError
from retention_bench.scoring.metric import MAX_DECODED_TOKENS, DecodedText
from retention_bench.scoring.prefixes import Prompt

Target = tuple[Prompt, Prompt]
"""What is given and what follows, at least one token each."""


class RetentionLM(TemplateLM):
    """An lm-eval model whose answers are `DecodedText` and end at the first content token.

    A task of lm-eval's own is answered as lm-eval's models do. A subclass sets `_answers` and `_logprobs` by `forget`
    before it is asked anything, and says how to `_ask` and to `_write`.
    """

    _answers: dict[Prompt, list[int]]
    _logprobs: dict[tuple[str, str], tuple[float, bool]]

    def prefetch(self, questions: Iterable[tuple[str, str]]) -> None:
        """Find answers and the targets' log-probabilities in the same passes.

        `generate_until` and `loglikelihood` take from it what they are asked next, until `forget`.

        Args:
            questions: Prompts and targets, each target with its leading space.

        Raises:
            RetentionBenchError: As `generate_until`.
        """
        self.forget()
        prompts: set[Prompt] = set()
        targets: dict[Target, list[tuple[str, str]]] = defaultdict(list)
        for prompt, target in set(questions):
            prompts.add(self.prompt_ids(prompt))
            context, continuation = self._encode_pair(prompt, target)
            if len(context) + len(continuation) < self.max_length:  # the rest is left to lm-eval's way, which cuts
                targets[tuple(context), tuple(continuation)].append((prompt, target))
        self._answers, logprobs = self._ask(prompts, targets.keys())
        for found, asked in targets.items():
            self._logprobs.update(dict.fromkeys(asked, logprobs[found]))

    def forget(self) -> None:
        """Drop what `prefetch` found, as it must be where the weights change."""
        self._answers, self._logprobs = {}, {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, with what `prefetch` found already."""
        rest = [request for request in requests if request.args not in self._logprobs]
        found = iter(super().loglikelihood(rest, disable_tqdm=disable_tqdm) if rest else [])
        return [self._logprobs[r.args] if r.args in self._logprobs else next(found) for r in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily, each until its first content token.

        The length limit is `MAX_DECODED_TOKENS`; generation settings in the requests are not looked at, but in those of
        lm-eval's own tasks.

        Args:
            requests: Instances whose first argument is the prompt.
            disable_tqdm: Whether lm-eval's own tasks show no bar; there is none for facts.

        Returns:
            A `DecodedText` a request, in order; plain text for lm-eval's own tasks.

        Raises:
            RetentionBenchError: A prompt leaves no room for an answer in the model's context.
        """
        if any(request.task_name and not request.task_name.startswith("retention_") for request in requests):
            return self._write(requests, disable_tqdm)
        prompts = [self.prompt_ids(request.args[0]) for request in requests]
        missing = set(prompts) - self._answers.keys()
        answers = self._answers | (self._ask(missing, ())[0] if missing else {})
        return [DecodedText(answers[prompt], self.tokenizer) for prompt in prompts]

    def prompt_ids(self, prompt: str) -> Prompt:
        """A prompt's token ids, as `lm_eval --model hf` makes them.

        Raises:
            RetentionBenchError: It leaves no room for an answer in the model's context.
        """
        ids = tuple(self.tok_encode(prompt))
        room = self.max_length - MAX_DECODED_TOKENS
        if not 0 < len(ids) <= room:
            raise RetentionBenchError(
                f"The prompt {prompt!r} is {len(ids)} tokens long; this model can answer prompts of 1 to {room} tokens "
                f"(context {self.max_length}, {MAX_DECODED_TOKENS} kept for the answer). Leave the fact out, or use a "
                "model with a longer context."
            )
        return ids

    @abstractmethod
    def _ask(
        self, prompts: Set[Prompt], targets: Iterable[Target]
    ) -> tuple[dict[Prompt, list[int]], dict[Target, tuple[float, bool]]]:
        """Answer prompts; find log-probabilities of targets in nats, and whether greedy decoding gives them."""

    @abstractmethod
    def _write(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        """Texts by the requests' generation settings."""
