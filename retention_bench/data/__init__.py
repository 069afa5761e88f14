"""Files that others wrote, read at one boundary."""

from retention_bench.data.files import (
    checked,
    find_file,
    parse_json,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    shortened,
)

__all__ = ["checked", "find_file", "parse_json", "read_json", "read_jsonl", "read_lines", "read_text", "shortened"]
