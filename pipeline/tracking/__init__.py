"""Recording a run: metrics.jsonl and events.jsonl first, MLflow from them.

`tracker.py` is what the training loop holds; `upload/` feeds MLflow in a process of its own; `report/` makes the page.
"""

from pipeline.tracking.tracker import Tracker, start

__all__ = ["Tracker", "start"]
