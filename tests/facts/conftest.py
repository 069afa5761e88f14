"""Real rows, where a machine has them."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data():
    """Gives the path of a real data file by its name, or skips the test."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RETENTION_BENCH_DATA", default))

    def find(name):
        if not (folder / name).is_file():
            pytest.skip(
                f"needs the real data file {name} in $RETENTION_BENCH_DATA (or ../shared/data): not in {folder}"
            )
        return folder / name

    return find
