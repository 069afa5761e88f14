"""Reading files and data sets that others wrote, in one place."""

from retention_bench.data.files import (
    check_characters,
    checked,
    find_file,
    fitted,
    has_half,
    locate,
    output_file,
    output_folder,
    parse_json,
    read_json,
    read_lines,
    read_text,
    shortened,
)
from retention_bench.data.source import HalfCharacterError, Row, RowError, Source, Table, is_local, read_jsonl

__all__ = [
    "HalfCharacterError",
    "Row",
    "RowError",
    "Source",
    "Table",
    "check_characters",
    "checked",
    "find_file",
    "fitted",
    "has_half",
    "is_local",
    "locate",
    "output_file",
    "output_folder",
    "parse_json",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_text",
    "shortened",
]
