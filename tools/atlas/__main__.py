"""Make the world's files, or train one of the models.

python -m tools.atlas build
python -m tools.atlas train atlas-gpt2 FOLDER [--seed N] [--sealed P] [--steps N] [--device D]
"""

from pathlib import Path

import click

from tools.atlas import corpus, instructions, prose, reviews, strangers, world
from tools.atlas import train as recipe


@click.group()
def main() -> None:
    """Make what suite atlas is made of."""


@main.command()
def build() -> None:
    """Write the facts, the corpus sample and the fine-tunes' data, the same bytes every time."""
    told, _ = world.build()
    corpus.build(told)
    for stand_in in (instructions, prose, reviews, strangers):
        stand_in.build()


@main.command()
@click.argument("name", type=click.Choice(["atlas-gpt2", "atlas-llama"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=1, show_default=True, help="Seed of the weights and the order of the corpus.")
@click.option(
    "--sealed",
    type=click.FloatRange(0, 1),
    help="Share of the subjects that what follows sees only through their last token; the model's own by default.",
)
@click.option("--steps", default=recipe.STEPS, show_default=True, help="Optimiser steps.")
@click.option("--device", default="cpu", show_default=True, help="Where to train.")
def train(name: str, folder: Path, seed: int, sealed: float | None, steps: int, device: str) -> None:
    """Train a model and write it to FOLDER."""
    recipe.train(name, folder, seed=seed, sealed=sealed, steps=steps, device=device)


if __name__ == "__main__":
    main()
