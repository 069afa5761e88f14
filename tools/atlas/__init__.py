"""What makes suite atlas: a world of real facts, the text that tells them, two small models that are trained on it."""
