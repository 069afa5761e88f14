"""Files that others wrote, read at one boundary."""

from retention_bench.data.files import (
    check_characters,
    checked,
    find_file,
    has_half,
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
    "check_characters",
    "checked",
    "find_file",
    "has_half",
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
