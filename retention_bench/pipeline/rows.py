"""Rows of text from a local file or a Hub data set."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from retention_bench.errors import RetentionBenchError


@dataclasses.dataclass(frozen=True)
class Texts:
    """The first texts of a corpus with a column `text`; read anew, one by one, each time they are gone through.

    Attributes:
        source: A local `.jsonl` or `.jsonl.gz` file, or a Hub data set id, which is streamed.
        revision: The Hub revision.
        config: The Hub data set's configuration.
        count: How many texts to read at most.
    """

    source: str
    revision: str | None
    config: str | None
    count: int

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            RetentionBenchError: A row has no text, or there are no rows.
        """
        path, number = Path(self.source), 0
        rows = _local(path) if path.is_file() else _hub(self.source, self.revision, self.config)
        for number, row in enumerate(itertools.islice(rows, self.count), start=1):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise RetentionBenchError(
                    f"{self.source}, row {number}: a corpus row needs a `text` that is not empty."
                )
            yield text
        if not number:
            raise RetentionBenchError(f"The corpus {self.source} holds no rows.")


def _local(path: Path) -> Iterator[object]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RetentionBenchError(f"{path}, line {number}: not JSON: {error}.") from error


def _hub(source: str, revision: str | None, config: str | None) -> Iterator[object]:
    import datasets

    yield from datasets.load_dataset(source, config, split="train", revision=revision, streaming=True)
