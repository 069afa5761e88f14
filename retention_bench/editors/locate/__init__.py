"""What locate-and-edit methods share: where the subject stands, keys and values there, and the residual to write."""
