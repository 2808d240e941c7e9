from copernicus.models.api import *
