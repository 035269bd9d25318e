"""Training, evaluation and prediction.

`train.train`, `evaluate.evaluate` and `predict.predict` are the ways in; `run` describes what a
run leaves on disk and `checkpoint` the weights files.
"""
