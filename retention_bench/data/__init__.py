"""Files that others wrote, read at one boundary."""

from retention_bench.data.files import (
    checked,
    cut,
    find_file,
    locate,
    output_file,
    output_folder,
    parse_json,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    shortened,
)

__all__ = [
    "checked",
    "cut",
    "find_file",
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
