"""Copernicus-Bench: what its tasks are and how their files are read."""

from copernicus.datasets.bench.task import Task
from copernicus.datasets.bench.tasks import TASKS, get_task, select_tasks

__all__ = ["TASKS", "Task", "get_task", "select_tasks"]
