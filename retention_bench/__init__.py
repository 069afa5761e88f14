"""retention-bench: which edits of a language model's knowledge survive fine-tuning."""

__version__ = "0.1.0"
