"""Language modelling on general text, such as C4's or FineWeb's documents from Common Crawl."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pydantic

from retention_bench.finetune.base import DataCheck, Example, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import TEXT, Sample
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.sampling import draw, look, sample_validation, samples, words
from retention_bench.finetune.settings import Positive, SampledSettings
from retention_bench.finetune.texts import check_tokenizer, encode_text


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CommonCrawlSettings(SampledSettings):
    """See `SampledSettings`; `source` has a column `text`, and a row is `max_length` tokens of packed documents."""

    lr: Positive = 5e-5


@dataclasses.dataclass(frozen=True)
class CommonCrawl:
    """The next token of general text, the paper's unstructured task.

    Documents that mention no fact are tokenised, each with EOS at its end, joined and cut into rows of `max_length`
    tokens, every one of which is a target. The paper says neither what its 60,000 rows are nor how long; that they are
    such rows is our choice. The validation rows are sampled from the training rows. A Hub data set is streamed: see
    `Source.rows` for what is then sampled.
    """

    settings: CommonCrawlSettings
    name: ClassVar[str] = "commoncrawl"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the documents; see `CheckedFinetune`."""
        settings = self.settings
        return look(settings, [TEXT], tokenizer)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter, tokenise and pack the documents.

        Raises:
            UsageError: The source does not exist, or the tokenizer has no EOS token.
            RetentionBenchError: A row is malformed, or too little text is left for `train_size` rows.
        """
        settings = self.settings
        check_tokenizer(context.tokenizer)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            samples(settings, TEXT, rng, dropped, stream=True),
            _packer(context.tokenizer, settings.max_length),
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=settings.source,
            setting="train_size",
            size=settings.train_size,
            what="documents",
            unit=f" packed rows of {settings.max_length} tokens",
        )
        validation = sample_validation(train, settings.validation_size, rng)
        return TuningData(train, validation, contamination.report(), dropped.report())


def _packer(tokenizer: Any, length: int) -> Callable[[Sample], list[Example]]:
    """What strings documents together; what is left of one after its last whole row begins the next row."""
    rest: list[int] = []

    def pack(document: Sample) -> list[Example]:
        rest.extend(encode_text(tokenizer, document.words))
        cut = len(rest) - len(rest) % length
        examples = [Example(ids, ids) for ids in (rest[i : i + length] for i in range(0, cut, length))]
        del rest[:cut]
        return examples

    return pack
