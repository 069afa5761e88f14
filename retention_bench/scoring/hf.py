"""lm-eval's Hugging Face model, decoding greedily past stop words and handing on token ids."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.progress import Progress, silent
from retention_bench.scoring.metric import MAX_DECODED_TOKENS, DecodedText, is_stop_token

Prompt = tuple[int, ...]
FirstLogits = Callable[[Sequence[Prompt], torch.Tensor], None]


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
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype=torch.float32,  # log-probabilities of a half-precision model, not rounded once more
        )
        self._progress = progress

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily, each until its first content token.

        The length limit is `MAX_DECODED_TOKENS`; generation settings in the requests are not looked at.

        Args:
            requests: Instances whose first argument is the prompt.
            disable_tqdm: Not used, there is no bar.

        Returns:
            A `DecodedText` a request, in order.

        Raises:
            RetentionBenchError: A prompt leaves no room for an answer in the model's context.
        """
        prompts = [self.prompt_ids(request.args[0]) for request in requests]
        answers = self.answer(prompts)
        return [DecodedText(answers[prompt], self.tokenizer) for prompt in prompts]

    def answer(self, prompts: Iterable[Prompt], first: FirstLogits | None = None) -> dict[Prompt, list[int]]:
        """Answer prompts greedily, each until its first content token.

        Args:
            prompts: Token ids, as `prompt_ids` gives them.
            first: Called with some of the prompts and the logits of their first new token [prompts, vocabulary].

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
                first(prompts, output.logits[:, -1])
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
