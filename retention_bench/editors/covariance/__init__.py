"""The covariance C of a model's keys over ordinary text (ROME's `mom2`): its file, and how it is collected."""
