"""The embedded default: a world of real facts and two small models that were trained on it."""
