"""A look into a fine-tune's data before anything expensive: what it cannot use is found out before the edits."""

from __future__ import annotations

from retention_bench.errors import UsageError
from retention_bench.finetune import CheckedFinetune, DataCheck
from retention_bench.pipeline.stage import Model
from retention_bench.pipeline.stages import Gather
from retention_bench.store import Store
from retention_bench.store.fingerprints import config_file


def check_data(plan: Gather, store: Store) -> DataCheck | None:
    """Look into the data of a plan's fine-tunes, with the tokenizer that they will use.

    Args:
        plan: The plan.
        store: Where what is there already is looked for.

    Returns:
        What was found; None where the store has the results or all fine-tunes, or the task does not look into its data.

    Raises:
        UsageError: The tokenizer, or the length of the rows, does not fit the data or the model.
        RetentionBenchError: The data cannot be used.
    """
    from retention_bench.models import load_tokenizer

    if store.holds(plan) or all(store.holds(stage) for stage in plan.finetunes):
        return None
    model, task = plan.base.model, plan.tuned_control.made()
    if not isinstance(task, CheckedFinetune):
        return None
    found = task.check(load_tokenizer(model.path, revision=model.revision))
    limit = _positions(model)
    if limit is not None and found.longest > limit:
        raise UsageError(
            f"The model takes {limit} tokens, and a row of {task.settings.source} has {found.longest}. Set "
            f"max_length to {limit}."
        )
    return found


def _positions(model: Model) -> int | None:
    """How many tokens the model takes; None where its configuration does not say so."""
    from retention_bench.models.loading import read_settings

    config = read_settings(config_file(model.path, model.revision).parent)
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    return limit if isinstance(limit, int) else None
