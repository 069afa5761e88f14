"""Undo what a trainer leaves behind on a model, and silence its libraries."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import transformers

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextlib.contextmanager
def given_back(model: Any) -> Iterator[None]:
    """Restore a model after training, weights apart: what was frozen, and what the trainer leaves behind.

    SFTTrainer replaces `forward` on the instance (and autocast does so again), Trainer writes `use_cache=False` into
    the config, which a checkpoint would carry on into slow decoding.
    """
    forward, use_cache = model.__dict__.get("forward"), model.config.use_cache
    # By name: FSDP puts others in the parameters' place, and could not free what is still referred to.
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # TRL aligns the special tokens of model and tokenizer.
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    tokens = [(config, name, getattr(config, name, None)) for config in configs for name in _SPECIAL]
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        model.__dict__.pop("_original_forward", None)  # accelerate's
        model.config.use_cache = use_cache
        for config, name, value in tokens:
            setattr(config, name, value)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted.get(name, parameter.requires_grad))
            parameter.grad = None
        model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries below error level: the stop rule reports to the caller, and the log tells the rest."""
    bars, shards = datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if shards:
            transformers.utils.logging.enable_progress_bar()
