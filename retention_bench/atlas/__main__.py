"""Make the world's files, or train one of the models.

python -m retention_bench.atlas build
python -m retention_bench.atlas train atlas-gpt2 FOLDER [--start FOLDER] [--steps N] [--seed N]
"""

from pathlib import Path

import click


@click.group()
def main() -> None:
    """Make what suite atlas is made of."""


@main.command()
def build() -> None:
    """Write the facts, the corpus sample and the instructions, the same bytes every time."""
    from retention_bench.atlas import corpus, instructions, world

    told, _ = world.build()
    corpus.build(told)
    instructions.build()


@main.command()
@click.argument("name", type=click.Choice(["atlas-gpt2", "atlas-llama"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="Go on from a model trained before.")
@click.option("--steps", default=900, show_default=True)
@click.option("--seed", default=1, show_default=True)
def train(name: str, folder: Path, start: Path | None, steps: int, seed: int) -> None:
    """Train a model and write it to FOLDER."""
    from retention_bench.atlas.train import train as run

    run(name, folder, start=start, steps=steps, seed=seed)


if __name__ == "__main__":
    main()
