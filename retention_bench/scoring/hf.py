"""lm-eval's Hugging Face model, which decodes greedily past stop words, and an engine that swaps checkpoints."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress, silent
from retention_bench.models import Checkpoint
from retention_bench.scoring.metric import MAX_ANSWER_TOKENS
from retention_bench.scoring.model import RetentionLM, Target, check_greedy, end_tokens
from retention_bench.scoring.prefixes import Prompt, Row, rows
from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval

FirstLogits = Callable[[Sequence[Prompt], torch.Tensor], None]


class RetentionHFLM(RetentionLM, HFLM):
    """`HFLM` for a loaded model, whose answers are `DecodedText`, see `RetentionLM`.

    Prompts get the ids that `lm_eval --model hf` gives them. What several begin with is read once (`prefixes.rows`); an
    answer doesn't depend on what shares its forward pass beyond rounding. Puts the model into eval mode.
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
            batch_size: Prompts a forward pass at most, each with its target; 512 tokens at most.
            progress: Told how many prompts are decoded.
        """
        with quiet_lm_eval(), _left_untied(model):
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                softmax_dtype=torch.float32,  # log-probabilities of a half-precision model, not rounded once more
            )
        self._progress = progress
        self.ends = end_tokens(getattr(model, "generation_config", None))
        self.vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
        self.forget()

    def answer(self, prompts: Iterable[Prompt], first: FirstLogits | None = None) -> dict[Prompt, list[int]]:
        """Answer prompts greedily, each until its first content token.

        Args:
            prompts: Token ids, as `prompt_ids` gives them.
            first: Called with some of the prompts and the logits of their first new token, (prompts, vocabulary).

        Returns:
            The ids decoded, by prompt.
        """
        return self._ask(dict.fromkeys(prompts, 1), (), first)[0]

    @torch.inference_mode()
    def _ask(
        self, prompts: Mapping[Prompt, int], targets: Iterable[Target], first: FirstLogits | None = None
    ) -> tuple[dict[Prompt, list[int]], dict[Target, tuple[float, bool]]]:
        answers: dict[Prompt, list[int]] = {}
        logprobs: dict[Target, tuple[float, bool]] = {}
        told: dict[Prompt, list[Target]] = defaultdict(list)  # by what is read for them
        for context, continuation in targets:
            told[context + continuation[:-1]].append((context, continuation))
        sequences = prompts.keys() | told.keys()
        # A row's mask knows of no window; what is longer than one is read by itself, as the model would.
        window = getattr(self.model.config.get_text_config(), "sliding_window", None) or self.max_length
        long = sorted(sequence for sequence in sequences if len(sequence) > window)
        masks = self.model.config._attn_implementation in ("eager", "sdpa")  # others take none of one's own
        together = rows(sequences - set(long), self.batch_size if masks else 1)
        for row in chain(together, *(rows([sequence], 1) for sequence in long)):
            asked = [sequence for sequence in row.paths if sequence in prompts]
            places = {prompt: row.paths[prompt][-1:] for prompt in asked}
            spans = {
                target: row.paths[sequence][len(target[0]) - 1 :] for sequence in row.paths for target in told[sequence]
            }
            looked_at = sorted({index for path in (*places.values(), *spans.values()) for index in path})
            logits, cache = self._read(row, looked_at)
            number = {index: i for i, index in enumerate(looked_at)}
            logprobs.update(_logprobs(logits, {t: [number[i] for i in span] for t, span in spans.items()}))
            if asked:
                last = logits[[number[index] for [index] in places.values()]]
                if first is not None:
                    first(asked, last)
                answers.update(self._decode({p: prompts[p] for p in asked}, last.argmax(-1).tolist(), row, cache))
            self._progress("scoring", len(answers), len(prompts))
        return answers, logprobs

    def _write(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        return HFLM.generate_until(self, requests, disable_tqdm=disable_tqdm)

    def _read(self, row: Row, looked_at: Sequence[int]) -> tuple[torch.Tensor, DynamicCache]:
        """Logits behind the tokens with some indices, float32, (indices, vocabulary); and the row's keys and values."""
        mask = None
        if len(row.paths) > 1:
            unseen = ~row.visible(self.device)
            mask = torch.zeros(unseen.shape, dtype=self.model.dtype, device=self.device)
            mask = mask.masked_fill(unseen, torch.finfo(mask.dtype).min)[None, None]
        output = self.model(
            input_ids=torch.tensor([row.tokens], device=self.device),
            position_ids=torch.tensor([row.positions], device=self.device),
            attention_mask=mask,
            past_key_values=DynamicCache(),  # not the model's own choice, which may drop what is beyond a window
            use_cache=True,
            logits_to_keep=torch.tensor(looked_at, device=self.device),
        )
        return output.logits[0].float(), output.past_key_values

    def _decode(
        self, prompts: Mapping[Prompt, int], tokens: Sequence[int], row: Row, cache: DynamicCache
    ) -> dict[Prompt, list[int]]:
        """Go on from first tokens; a prompt leaves the batch, and the key-value cache, once it is answered.

        Args:
            prompts: Sequences of the row, each with the length of its target.
            tokens: The first token of each answer.
            row: What has been read.
            cache: Of the row.
        """
        answers = {prompt: [token] for prompt, token in zip(prompts, tokens, strict=True)}
        going_on = [prompt for prompt, length in prompts.items() if self.goes_on(answers[prompt], length)]
        if not going_on:
            return answers
        lengths = torch.tensor([len(prompt) for prompt in going_on], device=self.device)
        cache, mask = _select(cache, [row.paths[prompt] for prompt in going_on], self.device)
        for step in range(MAX_ANSWER_TOKENS - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = self.model(
                input_ids=torch.tensor([answers[prompt][-1:] for prompt in going_on], device=self.device),
                position_ids=(lengths + step)[:, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
            for prompt, token in zip(going_on, output.logits[:, -1].argmax(dim=-1).tolist(), strict=True):
                answers[prompt].append(token)
            stay = [i for i, prompt in enumerate(going_on) if self.goes_on(answers[prompt], prompts[prompt])]
            if not stay:
                break
            going_on = [going_on[i] for i in stay]
            keep = torch.tensor(stay, device=self.device)
            lengths, mask = lengths[keep], mask[keep]
            cache.batch_select_indices(keep)
        return answers


def _logprobs(logits: torch.Tensor, spans: Mapping[Target, list[int]]) -> dict[Target, tuple[float, bool]]:
    """Log-probabilities of targets in nats, and whether each of their tokens is the most probable one.

    Args:
        logits: float32, (places, vocabulary).
        spans: For each target, the places whose next token is one of the target's.
    """
    places = [place for span in spans.values() for place in span]
    tokens = [token for _, continuation in spans for token in continuation]
    chosen = logits.log_softmax(-1)[places, tokens].tolist()
    greedy = (logits.argmax(-1)[places] == torch.tensor(tokens, device=logits.device)).tolist()
    found, start = {}, 0
    for target, span in spans.items():
        own = slice(start, start + len(span))
        found[target] = (sum(chosen[own]), all(greedy[own]))
        start += len(span)
    return found


def _select(
    cache: DynamicCache, paths: Sequence[Sequence[int]], device: torch.device
) -> tuple[DynamicCache, torch.Tensor]:
    """The keys and values of some of a row's sequences, a batch of their own.

    Args:
        cache: The row's.
        paths: Of each sequence, as in `Row.paths`.
        device: The model's.

    Returns:
        The cache, shorter sequences padded on the left; and 1 where something is to be seen, int64, (sequences,
        tokens).
    """
    longest = max(map(len, paths))
    index = torch.tensor([[0] * (longest - len(path)) + list(path) for path in paths], device=device)
    mask = torch.tensor([[0] * (longest - len(path)) + [1] * len(path) for path in paths], device=device)
    selected = DynamicCache()
    for number, (keys, values, _) in enumerate(cache):
        selected.update(keys[0][:, index].transpose(0, 1), values[0][:, index].transpose(0, 1), number)
    return selected, mask


@contextlib.contextmanager
def _left_untied(model: PreTrainedModel) -> Iterator[None]:
    """Keep lm-eval from tying a head that was trained apart from the embeddings to them, in the model it is handed."""
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.tie_weights


class HFEngine:
    """Loads one checkpoint after another with transformers, all in this process.

    Attributes:
        lm: Answers with the checkpoint that was swapped in last.
    """

    lm: RetentionHFLM

    def __init__(self, *, device: str, batch_size: int = 64, progress: Progress = silent) -> None:
        """Start without a model: `swap` comes first.

        Args:
            device: `"cpu"` or `"cuda"`.
            batch_size: Prompts a forward pass at most, each with its target; 512 tokens at most.
            progress: Told how many prompts are decoded.
        """
        self._device, self._batch_size, self._progress = device, batch_size, progress

    def swap(self, checkpoint: Checkpoint) -> None:
        """As `Engine.swap`."""
        self.close()  # its memory is needed for the next
        model, tokenizer = checkpoint.load(self._device)
        check_greedy(model.generation_config, checkpoint.adapter or checkpoint.folder)
        self.lm = RetentionHFLM(model, tokenizer, batch_size=self._batch_size, progress=self._progress)

    def close(self) -> None:
        """As `Engine.close`."""
        vars(self).pop("lm", None)
        gc.collect()
