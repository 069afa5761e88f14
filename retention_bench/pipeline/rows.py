"""The texts of a corpus, from a local file or a Hub data set."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

from retention_bench.data import RowError, Source


@dataclasses.dataclass(frozen=True)
class Texts:
    """The first texts of a corpus with a column `text`; read anew, one by one, each time they are gone through.

    Attributes:
        source: A local data file (see `Source`), or a Hub data set id, which is streamed.
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
            UsageError: There is no such file, or a Hub data set has no revision.
            RetentionBenchError: The file or the data set cannot be read, a row has no text, or there are no rows.
        """
        source = Source(self.source, self.revision, self.config, stream=True, what="corpus file")
        for place, cells in itertools.islice(source.rows(["text"]), min(self.count, sys.maxsize)):
            text = cells.get("text") if not isinstance(cells, RowError) else None
            if not isinstance(text, str) or not text.strip():
                raise RowError(source, place, "a corpus row needs a `text` that is not empty")
            yield text
