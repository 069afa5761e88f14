"""A look into a fine-tune's data before anything expensive: what it cannot use is found out before the edits."""

from __future__ import annotations

import json
from typing import Any

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import CheckedFinetune, DataCheck
from retention_bench.pipeline.cell import Plan
from retention_bench.pipeline.inputs import config_file
from retention_bench.pipeline.store import Store


def check_data(plan: Plan, store: Store) -> DataCheck | None:
    """Look into the data of a plan's fine-tunes, with the tokenizer that they will use.

    Args:
        plan: The plan.
        store: Where what is there already is looked for.

    Returns:
        What was found; None where the store has all fine-tunes, or the task does not look into its data.

    Raises:
        UsageError: The tokenizer, or the length of the rows, does not fit the data or the model.
        RetentionBenchError: The data cannot be used.
    """
    stages = [*(e.finetune for e in plan.experiments), plan.control]
    if not isinstance(plan.finetune, CheckedFinetune):
        return None
    if all(store.find(stage.name, stage.inputs) is not None for stage in stages):
        return None
    found = plan.finetune.check(load_tokenizer(plan.model.path, revision=plan.model.revision))
    limit = _positions(plan)
    if limit is not None and found.longest > limit:
        raise UsageError(
            f"The model takes {limit} tokens, and a row of {plan.finetune.source} has {found.longest}. Set max_length "
            f"to {limit}."
        )
    return found


def _positions(plan: Plan) -> int | None:
    """How many tokens the model takes; None where its configuration does not say so."""
    config = json.loads(config_file(plan.model.path, plan.model.revision).read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    return limit if isinstance(limit, int) else None


def load_tokenizer(path: str, *, revision: str | None = None) -> Any:
    """A model's tokenizer, without code of its own.

    Raises:
        RetentionBenchError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = " ".join(str(error).split())[:300]
        raise RetentionBenchError(
            f"The tokenizer of {path} could not be loaded ({type(error).__name__}: {reason})."
        ) from error
