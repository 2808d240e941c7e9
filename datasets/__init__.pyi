from copernicus.datasets.api import *  # noqa: F403
