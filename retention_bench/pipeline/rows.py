"""Rows of text from a local file or a Hub data set."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator

from retention_bench.data import read_jsonl
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
            UsageError: There is no such file.
            RetentionBenchError: The file or the data set cannot be read, a row has no text, or there are no rows.
        """
        number = 0
        rows = _local(self.source) if is_local(self.source) else _hub(self.source, self.revision, self.config)
        for number, row in itertools.islice(rows, min(self.count, sys.maxsize)):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise RetentionBenchError(
                    f"{self.source}, row {number}: a corpus row needs a `text` that is not empty."
                )
            yield text
        if not number:
            raise RetentionBenchError(f"The corpus {self.source} holds no rows.")


def is_local(source: str) -> bool:
    """Whether a corpus is meant as a file, be it there or not; else it is a Hub data set id.

    What is there under the name is meant: `datasets`, too, would take a folder for the data set, whatever its revision.
    """
    if source.startswith(("/", ".", "~")) or source.endswith((".jsonl", ".gz")):
        return True
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # no Hub id is so long, or has such characters
        return True
    return True


def _local(source: str) -> Iterator[tuple[int, object]]:
    return read_jsonl(source, "corpus file")


def _hub(source: str, revision: str | None, config: str | None) -> Iterator[tuple[int, object]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split="train", revision=revision, streaming=True)
        yield from enumerate(rows, start=1)
    except Exception as error:  # it is the library that goes on here, with network and parsers of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RetentionBenchError(
            f"The corpus {source!r} at revision {revision} cannot be read from the Hub ({reason}). Check the id, the "
            "revision, the configuration, the network and HF_HUB_OFFLINE; for a gated data set run `hf auth login`; "
            "or give a local .jsonl file."
        ) from error
