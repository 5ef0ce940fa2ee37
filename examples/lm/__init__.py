"""The parts of train_lm.py: model, data, learning-rate schedule, and what is said and written about a run."""
