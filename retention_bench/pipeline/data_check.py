"""A look into a fine-tune's data before anything expensive: what it cannot use is found out before the edits."""

from __future__ import annotations

from retention_bench.errors import UsageError
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
        What was found; None where the store has the results or all fine-tunes, or the task does not look into its data.

    Raises:
        UsageError: The tokenizer, or the length of the rows, does not fit the data or the model.
        RetentionBenchError: The data cannot be used.
    """
    from retention_bench.models import load_tokenizer

    stages = [*(e.finetune for e in plan.experiments), plan.control]
    if store.holds(plan.results.name, plan.results.inputs):
        return None
    if not isinstance(plan.finetune, CheckedFinetune):
        return None
    if all(store.holds(stage.name, stage.inputs) for stage in stages):
        return None
    found = plan.finetune.check(load_tokenizer(plan.model.path, revision=plan.model.revision))
    limit = _positions(plan)
    if limit is not None and found.longest > limit:
        raise UsageError(
            f"The model takes {limit} tokens, and a row of {plan.finetune.settings.source} has {found.longest}. Set "
            f"max_length to {limit}."
        )
    return found


def _positions(plan: Plan) -> int | None:
    """How many tokens the model takes; None where its configuration does not say so."""
    from retention_bench.models.loading import read_settings

    config = read_settings(config_file(plan.model.path, plan.model.revision).parent)
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    return limit if isinstance(limit, int) else None
