"""Language modelling on general text, such as C4's or FineWeb's documents from Common Crawl."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import pydantic

from retention_bench.finetune.base import DataCheck, Example, Metric, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import TEXT, Sample
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.sampling import draw, look, sample_validation, samples, words
from retention_bench.finetune.settings import Positive, Settings, check_sampled_validation
from retention_bench.finetune.texts import check_tokenizer, encode_text


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CommonCrawl(Settings):
    """The next token of general text, the paper's unstructured task.

    Documents that mention no fact are tokenised, each with EOS at its end, strung together and cut into rows of
    `max_length` tokens, every one of which is a target. The paper says neither what its 60,000 rows are nor how long;
    that they are such rows is our own choice. The validation rows are sampled from the training rows.

    Attributes:
        source: A data file (see `Source`) or a Hub data set id, with a column `text`. A Hub data set is
            streamed: see `Source.rows` for what is then sampled.
    """

    name: ClassVar[str] = "commoncrawl"
    metric: ClassVar[Metric] = "validation_loss"
    classes: ClassVar[int | None] = None
    asks_base: ClassVar[bool] = False

    lr: Positive = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled_validation(self.train_size, self.validation_size)

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the documents; see `CheckedFinetune`."""
        return look(self, [TEXT], tokenizer)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter, tokenise and pack the documents.

        Raises:
            UsageError: The source does not exist, or the tokenizer has no EOS token.
            RetentionBenchError: A row is malformed, or too little text is left for `train_size` rows.
        """
        check_tokenizer(context.tokenizer)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        train = draw(
            samples(self, TEXT, rng, dropped, stream=True),
            _packer(context.tokenizer, self.max_length),
            text=words,
            contamination=contamination,
            dropped=dropped,
            source=self.source,
            setting="train_size",
            size=self.train_size,
            what="documents",
            unit=f" packed rows of {self.max_length} tokens",
        )
        validation = sample_validation(train, self.validation_size, rng)
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
