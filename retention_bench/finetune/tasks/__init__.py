"""The downstream tasks, one file each; `retention_bench/registry.py` names them."""
