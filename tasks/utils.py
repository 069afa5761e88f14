"""What the task files refer to as `!function utils.…`; the logic is in `retention_bench.scoring`."""

from retention_bench.scoring import FactsTask, judge_document, load_documents

__all__ = ["FactsTask", "judge_document", "load_documents"]
