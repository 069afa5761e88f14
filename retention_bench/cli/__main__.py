"""`python -m retention_bench.cli` is `retention-bench`."""

from retention_bench.cli import main

if __name__ == "__main__":
    main()
