"""lm-eval's Hugging Face model, decoding greedily past stop words and handing on token ids; and one that stays up."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.models import Layout, empty_model
from retention_bench.progress import Progress, silent
from retention_bench.scoring.contained import contained_lm_eval
from retention_bench.scoring.metric import MAX_DECODED_TOKENS, DecodedText, is_stop_token

Prompt = tuple[int, ...]
FirstLogits = Callable[[Sequence[Prompt], torch.Tensor, Any], None]


class RetentionHFLM(HFLM):
    """`HFLM` for a loaded model, whose answers are `DecodedText` and end at the first content token.

    Prompts get the ids that `lm_eval --model hf` gives them. Prompts of equal length are decoded together: without
    padding there is nothing to mask, and an answer doesn't depend on what shares its batch beyond rounding. Puts the
    model into eval mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        progress: Progress = silent,
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal language model, on the device it should run on.
            tokenizer: Its tokenizer; a copy is used, since lm-eval gives a tokenizer without one a padding token.
            batch_size: Prompts a forward pass.
            progress: Told how many prompts are decoded.
        """
        with contained_lm_eval():
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                softmax_dtype=torch.float32,  # log-probabilities of a half-precision model, not rounded once more
            )
        self._progress = progress
        self._answers: dict[Prompt, list[int]] = {}
        self._logprobs: dict[tuple[str, str], tuple[float, bool]] = {}

    def prefetch(self, questions: Iterable[tuple[str, str]]) -> None:
        """Read every prompt once, for its answer and for its target's log-probability.

        `generate_until` and `loglikelihood` take from it what they are asked next, until `forget`.

        Args:
            questions: Prompts and targets, each target with its leading space.

        Raises:
            RetentionBenchError: As `generate_until`.
        """
        self.forget()
        targets: dict[Prompt, dict[Prompt, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        prompts = set()
        for prompt, target in set(questions):
            prompts.add(self.prompt_ids(prompt))
            context, continuation = self._encode_pair(prompt, target)
            if len(context) + len(continuation) > self.max_length:
                continue  # lm-eval cuts off the context's beginning
            targets[tuple(context)][tuple(continuation)].append((prompt, target))

        def keep(batch: Sequence[Prompt], logits: torch.Tensor, cache: Any) -> None:
            wanted = [(row, target) for row, prompt in enumerate(batch) for target in targets[prompt]]
            for (row, target), found in zip(wanted, self._continue(wanted, logits, cache), strict=True):
                self._logprobs.update(dict.fromkeys(targets[batch[row]][target], found))

        answers = self.answer(prompts | targets.keys(), keep)
        self._answers = {prompt: answers[prompt] for prompt in prompts}

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

        The length limit is `MAX_DECODED_TOKENS`; generation settings in the requests are not looked at. Requests of
        lm-eval's own tasks are answered as `HFLM` does.

        Args:
            requests: Instances whose first argument is the prompt.
            disable_tqdm: Not used, there is no bar.

        Returns:
            A `DecodedText` a request, in order.

        Raises:
            RetentionBenchError: A prompt leaves no room for an answer in the model's context.
        """
        if is_general(requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        prompts = [self.prompt_ids(request.args[0]) for request in requests]
        answers = self._answers | self.answer(prompt for prompt in prompts if prompt not in self._answers)
        return [DecodedText(answers[prompt], self.tokenizer) for prompt in prompts]

    def answer(self, prompts: Iterable[Prompt], first: FirstLogits | None = None) -> dict[Prompt, list[int]]:
        """Answer prompts greedily, each until its first content token.

        Args:
            prompts: Token ids, as `prompt_ids` gives them.
            first: Called with some of the prompts, the logits of their first new token [prompts, vocabulary] and the
                key-value cache that they left, which must stay as it is.

        Returns:
            The ids decoded, by prompt.
        """
        answers: dict[Prompt, list[int]] = {}
        todo = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        for batch in _equal_length_batches(todo, self.batch_size):
            answers.update(zip(batch, self._answer(batch, first), strict=True))
            self._progress("scoring", len(answers), len(todo))
        return answers

    def prompt_ids(self, prompt: str) -> Prompt:
        """As the function `prompt_ids`, for this model."""
        return prompt_ids(self, prompt)

    @torch.inference_mode()
    def _answer(self, prompts: Sequence[Prompt], first: FirstLogits | None) -> list[list[int]]:
        """Decode prompts of equal length; a row leaves the batch, and the key-value cache, once it is answered."""
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = list(range(len(prompts)))
        inputs = torch.tensor(prompts, device=self.device)  # (rows, length)
        cache = None
        for step in range(MAX_DECODED_TOKENS):
            output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if first is not None and step == 0:
                first(prompts, output.logits[:, -1], output.past_key_values)
            tokens = output.logits[:, -1].argmax(dim=-1)  # (rows,)
            for row, token in zip(open_rows, tokens.tolist(), strict=True):
                answers[row].append(token)
            going_on = [i for i, row in enumerate(open_rows) if is_stop_token(answers[row][-1], self.tokenizer)]
            if not going_on:
                break
            keep = torch.tensor(going_on, device=self.device)
            open_rows = [open_rows[i] for i in going_on]
            inputs = tokens[keep, None]
            cache = output.past_key_values
            cache.batch_select_indices(keep)
        return answers

    def _continue(
        self, wanted: Sequence[tuple[int, Prompt]], logits: torch.Tensor, cache: Any
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations of prompts that have been read, and whether greedy decoding gives them.

        Args:
            wanted: Rows of the batch, and token ids that follow.
            logits: Of the next token [rows, vocabulary].
            cache: The batch's key-value cache.
        """
        first = logits.float().log_softmax(-1)
        sums = [first[row, target[0]].item() for row, target in wanted]
        greedy = [bool(first[row].argmax() == target[0]) for row, target in wanted]
        longer = [number for number, (_, target) in enumerate(wanted) if len(target) > 1]
        if longer:
            own = copy.deepcopy(cache)
            own.batch_select_indices(torch.tensor([wanted[number][0] for number in longer], device=self.device))
            # What pads a row on the right comes after all that is looked at.
            rows = [torch.tensor(wanted[number][1][:-1], device=self.device) for number in longer]
            inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            output = self.model(input_ids=inputs, past_key_values=own, use_cache=True)
            for number, scores in zip(longer, output.logits.float().log_softmax(-1), strict=True):
                rest = torch.tensor(wanted[number][1][1:], device=self.device)
                own_scores = scores[: len(rest)]
                sums[number] += own_scores.gather(1, rest[:, None]).sum().item()
                greedy[number] = greedy[number] and bool((own_scores.argmax(-1) == rest).all())
        return list(zip(sums, greedy, strict=True))


class HFEngine:
    """A Hugging Face model that takes one checkpoint's weights after another's.

    Attributes:
        lm: Answers with the weights that it has now.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: str, batch_size: int = 64, progress: Progress = silent
    ) -> None:
        """Start without weights: `swap` comes first.

        Args:
            folder: A folder with a model's configuration and tokenizer.
            dtype: What weights are converted to.
            device: `"cpu"` or `"cuda"`.
            batch_size: Prompts a forward pass.
            progress: Told how many prompts are decoded.

        Raises:
            UsageError: As `empty_model`.
            RetentionBenchError: As `empty_model`.
        """
        self._model, tokenizer = empty_model(folder, device=device, dtype=dtype)
        self._layout = Layout.of(self._model.config)
        self.lm = RetentionHFLM(self._model, tokenizer, batch_size=batch_size, progress=progress)

    @torch.no_grad()
    def swap(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As `Engine.swap`."""
        self.lm.forget()
        state = self._model.state_dict()  # the tensors themselves
        for name, tensor in self._layout.check(weights):
            state[name].copy_(tensor)

    def close(self) -> None:
        """As `Engine.close`."""
        self.__dict__.clear()
        gc.collect()


def is_general(requests: Iterable[Instance]) -> bool:
    """Whether requests are those of a task of lm-eval's own, which has generation settings that count."""
    return any(request.task_name and not request.task_name.startswith("retention_") for request in requests)


def prompt_ids(lm: TemplateLM, prompt: str) -> Prompt:
    """A prompt's token ids.

    Args:
        lm: The model that will answer it; its `tok_encode` and `max_length` count.
        prompt: The text.

    Raises:
        RetentionBenchError: It leaves no room for an answer in the model's context.
    """
    ids = tuple(lm.tok_encode(prompt))
    room = lm.max_length - MAX_DECODED_TOKENS
    if not 0 < len(ids) <= room:
        raise RetentionBenchError(
            f"The prompt {prompt!r} is {len(ids)} tokens long; this model can answer prompts of 1 to {room} tokens "
            f"(context {lm.max_length}, {MAX_DECODED_TOKENS} kept for the answer). Leave the fact out, or use a "
            "model with a longer context."
        )
    return ids


def _equal_length_batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Cut prompts that are sorted by length into batches of at most `size`, each of one length."""
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) == size or len(prompt) != len(batch[0])):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
