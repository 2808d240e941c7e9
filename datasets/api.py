"""The public names of ``copernicus.datasets``."""

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Task
from copernicus.datasets.bench.tasks import TASKS, get_task, select_tasks
from copernicus.datasets.sensors import METADATA_FIELDS, SENSORS, InputError, Sensor, get_sensor

__all__ = [
    "METADATA_FIELDS",
    "SENSORS",
    "TASKS",
    "InputError",
    "Sensor",
    "Task",
    "TaskDataset",
    "get_sensor",
    "get_task",
    "select_tasks",
]
