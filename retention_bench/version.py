"""The package's version and where it is, for modules that must not import the package's API."""

from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).resolve().parent
"""The package's folder."""
