"""Copernicus-Bench: what its tasks are and how their files are read."""

from copernicus.datasets.bench.task import Task
from copernicus.datasets.bench.tasks import SELECTABLE, TASKS, VARIANTS, get_task, select_tasks

__all__ = ["SELECTABLE", "TASKS", "VARIANTS", "Task", "get_task", "select_tasks"]
