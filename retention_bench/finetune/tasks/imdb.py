"""Whether a film review is for or against its film: a linear head on the state of EOS (`stanfordnlp/imdb`)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, ClassVar

import pydantic

from retention_bench.data import is_local
from retention_bench.finetune.base import DataCheck, Example, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.dataset_formats import Sample, encoder, labelled
from retention_bench.finetune.dropped import Dropped, Unusable
from retention_bench.finetune.sampling import draw, look, samples, words
from retention_bench.finetune.settings import Count, Metric, Size, TrainingSettings


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class IMDBSettings(TrainingSettings):
    """See `TrainingSettings`; `source` has the columns `text` and `label`, and `threshold` is an accuracy.

    Attributes:
        train_size: Training rows, sampled by seed from the rows that pass the contamination filter. None for all of
            them: the paper's 25,000 are all that IMDB has, and some mention a fact.
        validation_size: Validation rows.
    """

    batch_size: Count = 64
    eval_every: Count = 5
    train_size: Size | None = None
    validation_size: Size

    @property
    def metric(self) -> Metric:
        """The accuracy."""
        return "validation_accuracy"

    @property
    def classes(self) -> int:
        """Against and for."""
        return 2


@dataclasses.dataclass(frozen=True)
class IMDB:
    """Reviews with the label 0 (against) or 1 (for), the paper's classification task.

    A row is a review and EOS; a long review is cut at `max_length` tokens and EOS is kept. No training row has the
    tokens of a validation row. Of a Hub data set the training rows are from the split `train` and the validation rows
    from `test`; of a local file they are different rows.
    """

    settings: IMDBSettings
    name: ClassVar[str] = "imdb"

    def check(self, tokenizer: Any) -> DataCheck:
        """Look into the reviews; see `CheckedFinetune`."""
        settings = self.settings
        size = settings.validation_size + (settings.train_size or 1)
        return look(settings, [labelled(2)], tokenizer, size=size, setting="validation_size and train_size together")

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the reviews.

        Raises:
            UsageError: The source does not exist, or the tokenizer has no EOS token.
            RetentionBenchError: A row is malformed, or too few rows are left after filtering.
        """
        settings = self.settings
        data_format, encode = labelled(2), encoder(context.tokenizer, settings.max_length)
        rng = random.Random(context.seed)
        contamination, dropped = ContaminationFilter(context.terms), Dropped()
        taken: set[tuple[int, ...]] = set()

        def encode_new(sample: Sample) -> list[Example]:
            [example] = encode(sample)
            if tuple(example.input_ids) in taken:
                raise Unusable("read like one that is validated on")
            return [example]

        def drawn(setting: str, size: int | None, what: str) -> list[Example]:
            return draw(
                rows,
                encode_new,
                text=words,
                contamination=contamination,
                dropped=dropped,
                source=settings.source,
                setting=setting,
                size=size,
                what=what,
            )

        local = is_local(settings.source)
        rows = samples(settings, data_format, rng, dropped, split="train" if local else "test")
        validation = drawn("validation_size", settings.validation_size, "rows" if local else "rows in the split test")
        taken.update(tuple(example.input_ids) for example in validation)
        if not local:
            rows = samples(settings, data_format, rng, dropped)
        what = "rows besides those validated on" if local else "rows in the split train"
        train = drawn("train_size", settings.train_size, what)
        return TuningData(train, validation, contamination.report(), dropped.report())
