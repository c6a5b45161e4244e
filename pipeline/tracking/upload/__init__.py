"""From the run folder to MLflow: the only code, besides `tracking/system.py`, that imports mlflow.

It never runs in the process that trains.
"""
