"""Tasks of lm-evaluation-harness on a run's checkpoints; the only code that imports `lm_eval`.

The harness makes the requests and computes the metrics; `language_model.py` answers the requests with our model and
`scoring.py` computes them. The loss on the validation split is `train/evaluate.py`.
"""
