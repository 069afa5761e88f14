"""Facts: what is edited, what is asked, which of them a model knows, and how they are split."""

from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.keywords import keyword_forms, relation_keywords
from retention_bench.facts.known import Knowledge, Remaining, knowledge, known_facts
from retention_bench.facts.paraphrases import MODEL, Augmented, Sources, augment, parse_source, unseen
from retention_bench.facts.pool import Pool, RowCounts, load_pool, read_pool
from retention_bench.facts.split import Split, disjoint_split
from retention_bench.facts.target import FirstTokens, first_tokens, object_ids, target_token, token_text

__all__ = [
    "MODEL",
    "Augmented",
    "Fact",
    "FactSet",
    "FirstTokens",
    "Knowledge",
    "Pool",
    "Remaining",
    "RowCounts",
    "Sources",
    "Split",
    "augment",
    "disjoint_split",
    "first_tokens",
    "keyword_forms",
    "knowledge",
    "known_facts",
    "load_pool",
    "object_ids",
    "parse_source",
    "read_pool",
    "relation_keywords",
    "target_token",
    "token_text",
    "unseen",
]
