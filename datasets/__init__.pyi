from copernicus.datasets.api import *
