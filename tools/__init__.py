"""What makes files that are committed. It runs from a checkout and is in no wheel."""
