"""What a person sees on a terminal."""

from retention_bench.display.escape import markup, plain

__all__ = ["markup", "plain"]
