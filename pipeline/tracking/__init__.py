"""Recording a run: metrics.jsonl and events.jsonl first, MLflow from them.

`start` gives the training loop its tracker. mlflow is imported only in this package, and never in the process
that trains.
"""

from pipeline.tracking.tracker import Tracker, start

__all__ = ["Tracker", "start"]
