"""What a person sees on a terminal."""

from retention_bench.display.escape import cut, json_text, line, markup, plain
from retention_bench.display.streams import prepare_streams, say, say_error, say_json, screen

__all__ = ["cut", "json_text", "line", "markup", "plain", "prepare_streams", "say", "say_error", "say_json", "screen"]
