"""Fine-tunes in several processes, one a GPU, started by `accelerate`."""
