"""`python -m retention_bench.atlas build` makes the world's files, `… train NAME FOLDER` one of the models."""

import sys
from pathlib import Path

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build"]:
            from retention_bench.atlas import corpus, instructions, world

            told, _ = world.build()
            corpus.build(told)
            instructions.build()
        case ["train", ("atlas-gpt2" | "atlas-llama") as name, folder, *rest]:
            from retention_bench.atlas.train import train

            train(name, Path(folder), **({"steps": int(rest[0])} if rest else {}))
        case _:
            sys.exit("usage: python -m retention_bench.atlas build | train atlas-gpt2|atlas-llama FOLDER [STEPS]")
