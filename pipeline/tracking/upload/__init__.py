"""Sends a run folder to MLflow, outside the training process; only this and `tracking/system.py` import mlflow."""
