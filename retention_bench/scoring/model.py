"""What lm-eval's Hugging Face model and ours for vLLM have in common: how they are asked about facts."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import GenerationConfig

from retention_bench.errors import RetentionBenchError
from retention_bench.results.kinds import KINDS
from retention_bench.scoring.metric import MAX_ANSWER_TOKENS, MAX_TARGET_TOKENS, DecodedText, is_answered, target_ids
from retention_bench.scoring.prefixes import Prompt

Target = tuple[Prompt, Prompt]
"""What is given and what follows, at least one token each."""


def end_tokens(config: GenerationConfig | None) -> frozenset[int]:
    """The end tokens of a generation configuration: none, one or several."""
    ends = getattr(config, "eos_token_id", None)
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "dola_layers": (),
    "max_time": (),
}


def check_greedy(config: GenerationConfig | None, name: str) -> None:
    """Refuse generation settings by which plain lm_eval would decode otherwise than greedily, with no way to say no.

    `repetition_penalty` is not among them: the tasks set it to 1.

    Args:
        config: The checkpoint's.
        name: The checkpoint, for the error.

    Raises:
        RetentionBenchError: There is one; it is named.
    """
    for setting, neutral in _NEUTRAL.items():
        value = getattr(config, setting, None)
        if value is not None and value not in neutral:
            raise RetentionBenchError(
                f"generation_config.json of {name} sets {setting} to {str(value)[:60]}, which changes greedy answers: "
                "lm_eval would apply it, and the retention metric does not know it. Take it out of the file."
            )


class RetentionLM(TemplateLM):
    """An lm-eval model whose answers are `DecodedText` and end where the verdict is certain, see `is_answered`.

    A task of lm-eval's own is answered as lm-eval's models do. A subclass sets `_answers` and `_logprobs` by `forget`
    before it is asked anything, sets `ends`, and says how to `_ask` and to `_write`.

    Attributes:
        ends: Tokens that end an answer besides special ones: the model's end tokens, as its generation configuration
            has them.
        vocabulary: How many tokens the model has embeddings for; None where that is not known.
    """

    ends: frozenset[int]
    vocabulary: int | None = None
    _answers: dict[Prompt, list[int]]
    _lengths: dict[Prompt, int]
    _logprobs: dict[tuple[str, str], tuple[float, bool]]

    def prefetch(self, questions: Iterable[tuple[str, str]]) -> None:
        """Find answers and the targets' log-probabilities in the same passes.

        `generate_until` and `loglikelihood` take from it what they are asked next, until `forget`.

        Args:
            questions: Prompts and targets, each target as it stands behind its prompt, with its leading space.

        Raises:
            RetentionBenchError: As `generate_until`.
        """
        self.forget()
        lengths: dict[Prompt, int] = {}
        targets: dict[Target, list[tuple[str, str]]] = defaultdict(list)
        for prompt, target in set(questions):
            ids = self.prompt_ids(prompt)
            lengths[ids] = max(
                lengths.get(ids, 0), self.answer_length(target.removeprefix(" "), words=not target.startswith(" "))
            )
            context, continuation = self._encode_pair(prompt, target)
            self._check_known(target, continuation)
            if len(context) + len(continuation) < self.max_length:  # the rest is left to lm-eval's way, which cuts
                targets[tuple(context), tuple(continuation)].append((prompt, target))
        self._answers, logprobs = self._ask(lengths, targets.keys())
        self._lengths = lengths
        for found, asked in targets.items():
            self._logprobs.update(dict.fromkeys(asked, logprobs[found]))

    def forget(self) -> None:
        """Drop what `prefetch` found, as it must be where the weights change."""
        self._answers, self._lengths, self._logprobs = {}, {}, {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, with what `prefetch` found already."""
        rest = [request for request in requests if request.args not in self._logprobs]
        found = iter(super().loglikelihood(rest, disable_tqdm=disable_tqdm) if rest else [])
        return [self._logprobs[r.args] if r.args in self._logprobs else next(found) for r in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily, each as far as its target is long.

        The length limit is `MAX_ANSWER_TOKENS`; generation settings in the requests are not looked at, but in those of
        lm-eval's own tasks.

        Args:
            requests: Instances whose first argument is the prompt; the `target` of their documents says how far.
            disable_tqdm: Whether lm-eval's own tasks show no bar; there is none for facts.

        Returns:
            A `DecodedText` a request, in order; plain text for lm-eval's own tasks.

        Raises:
            RetentionBenchError: A prompt leaves no room for an answer in the model's context.
        """
        if any(request.task_name and not request.task_name.startswith("retention_") for request in requests):
            return self._write(requests, disable_tqdm)
        asked = [(self.prompt_ids(r.args[0]), self._asked_length(r.doc)) for r in requests]
        missing: dict[Prompt, int] = {}
        for prompt, length in asked:
            if length > self._lengths.get(prompt, 0):
                missing[prompt] = max(missing.get(prompt, 0), length)
        answers = self._answers | (self._ask(missing, ())[0] if missing else {})
        # Cut, so that an answer does not depend on what else is asked.
        return [DecodedText(self._cut(answers[prompt], length), self.tokenizer) for prompt, length in asked]

    def answer_length(self, target: str, *, words: bool) -> int:
        """Tokens to decode from the first content token on: those of the target.

        Args:
            target: Without its leading space.
            words: Whether words decide, as in a chat: then the target begins a line, and one token more tells whether
                its last word has ended.
        """
        if words:
            return min(MAX_TARGET_TOKENS, len(self.tokenizer.encode(target, add_special_tokens=False)) + 1)
        return max(1, len(target_ids(target, self.tokenizer)))

    def _asked_length(self, document: Mapping[str, str]) -> int:
        kind = KINDS.get(document.get("kind", ""))
        return self.answer_length(document.get("target", ""), words=kind is not None and kind.form == "chat")

    def prompt_ids(self, prompt: str) -> Prompt:
        """A prompt's token ids, as `lm_eval --model hf` makes them.

        Raises:
            RetentionBenchError: It leaves no room for an answer in the model's context.
        """
        ids = tuple(self.tok_encode(prompt))
        room = self.max_length - MAX_ANSWER_TOKENS
        if not 0 < len(ids) <= room:
            raise RetentionBenchError(
                f"The prompt {prompt!r} is {len(ids)} tokens long; this model can answer prompts of 1 to {room} tokens "
                f"(context {self.max_length}, {MAX_ANSWER_TOKENS} kept for the answer). Leave the fact out, or use a "
                "model with a longer context."
            )
        self._check_known(prompt, ids)
        return ids

    def _check_known(self, text: str, ids: Iterable[int]) -> None:
        """Refuse tokens that the model has no embedding for; on a GPU they would end every model in the process.

        Raises:
            RetentionBenchError: The tokenizer is another model's.
        """
        largest = max(ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise RetentionBenchError(
                f"The tokenizer gives {text!r} the token {largest}, and the model knows {self.vocabulary}. Give it its "
                "own tokenizer: put that into its folder, or give --tokenizer FOLDER."
            )

    def goes_on(self, ids: Sequence[int], length: int) -> bool:
        """Whether decoding goes on: not behind the model's end tokens, else see `is_answered`."""
        return ids[-1] not in self.ends and not is_answered(ids, length, self.tokenizer)

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """Up to the first token at which decoding ends, and with it."""
        ends = (end for end in range(1, len(ids) + 1) if not self.goes_on(ids[:end], length))
        return ids[: next(ends, len(ids))]

    @abstractmethod
    def _ask(
        self, prompts: Mapping[Prompt, int], targets: Iterable[Target]
    ) -> tuple[dict[Prompt, list[int]], dict[Target, tuple[float, bool]]]:
        """Answer prompts, and find log-probabilities of targets in nats, and whether greedy decoding gives them.

        Args:
            prompts: Each with the length that its answer should have, see `answer_length`.
            targets: What to find the log-probabilities of.
        """

    @abstractmethod
    def _write(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        """Texts by the requests' generation settings."""
