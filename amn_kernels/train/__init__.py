"""Training, evaluation and demo of next-vector predictors; needs the `train` extra."""
