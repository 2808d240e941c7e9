from copernicus.models.api import *  # noqa: F403
