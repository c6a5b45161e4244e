"""Records a run in metrics.jsonl and events.jsonl, and feeds MLflow from them.

`tracker.py` is what the training loop holds; `upload/` feeds MLflow in a process of its own; `report/` makes the page.
"""

from pipeline.tracking.tracker import Tracker, start

__all__ = ["Tracker", "start"]
