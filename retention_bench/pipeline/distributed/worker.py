"""One of the processes that `accelerate` starts for a fine-tune.

Run as `python -m retention_bench.pipeline.distributed.worker PLAN KEY STORE FOLDER WORK MICRO_BATCH_SIZE`. What it has
to say goes to standard output, a JSON object a line: `{"progress": [stage, done, total, figures]}`, `{"notice": text}`,
`{"error": message, "usage": bool}`, `{"out_of_memory": true}` or `{"bug": traceback}`.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retention_bench.display.progress import silent
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.plan_file import read_plan
from retention_bench.pipeline.stage import Bench
from retention_bench.pipeline.stages import STAGES, Finetune
from retention_bench.processes import end_with_parent
from retention_bench.store import Store
from retention_bench.store.disk import disk_errors


def main(plan: str, key: str, store: str, folder: str, work: str, micro_batch_size: str) -> None:
    """Take part in a fine-tune.

    Args:
        plan: The file of a plan that holds it.
        key: The fine-tune's key.
        store: The store's folder; it holds all that the fine-tune needs.
        folder: Where the result goes.
        work: A folder that outlives a kill.
        micro_batch_size: Rows in a forward pass.
    """
    import torch
    from accelerate import PartialState

    from retention_bench.finetune import processes

    logging.getLogger("retention_bench").addHandler(_Notices())
    end_with_parent()
    stage = read_plan(Path(plan), STAGES)[key]
    assert isinstance(stage, Finetune)  # nothing else is started in several processes
    # The process group, and this process's own GPU. The others wait as long while the first one writes a model.
    PartialState(cpu=stage.model.device == "cpu", timeout=datetime.timedelta(hours=1))
    try:
        with disk_errors("the finetune stage", Path(folder).parent):
            bench = Bench(Store(Path(store)), silent if processes.index() else _report)
            stage.train(Path(folder), Path(work), bench, int(micro_batch_size))
    except RetentionBenchError as error:
        _fail({"error": str(error), "usage": isinstance(error, UsageError)})
    except torch.OutOfMemoryError:
        _fail({"out_of_memory": True})
    except Exception:
        _fail({"bug": traceback.format_exc()})
    processes.gathered(None)  # nobody leaves before the first has written
    # At once: in an orderly exit a thread of torch's is now and then destroyed while it runs, and that aborts.
    sys.stdout.flush()
    os._exit(0)


class _Notices(logging.Handler):
    """Hands on what the package has to say: standard error is not ours."""

    def emit(self, record: logging.LogRecord) -> None:
        _say({"notice": record.getMessage()})


def _report(stage: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
    _say({"progress": [stage, done, total, dict(figures or {})]})


def _say(message: Mapping[str, Any]) -> None:
    # One write: other processes' lines do not come in between.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _fail(message: Mapping[str, Any]) -> None:
    """Say why and end at once; the others wait for this process, and are ended by their launcher."""
    _say(message)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
