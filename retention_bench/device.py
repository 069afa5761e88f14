"""Which device work runs on."""

from __future__ import annotations

from retention_bench.errors import RetentionBenchError, unknown_name

DEVICES = ("auto", "cpu", "cuda")


def chosen_device(asked: str) -> str:
    """The device to run on: `"cpu"` or `"cuda"`.

    Args:
        asked: One of `DEVICES`; `"auto"` takes a GPU where there is one.

    Raises:
        UsageError: There is no such device.
        RetentionBenchError: CUDA was asked for and is not there.
    """
    if asked not in DEVICES:
        raise unknown_name("device", asked, DEVICES)
    if asked == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise RetentionBenchError(
            "--device cuda: torch finds no CUDA device here. Give --device cpu, or run on a machine with a GPU."
        )
    return "cuda" if there else "cpu"
