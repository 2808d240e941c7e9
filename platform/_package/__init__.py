"""copernicus: experiments with the Copernicus Earth-observation foundation model, on Ray.

The packages below are the repository's top-level folders. Those folders may not hold an ``__init__.py`` (in a checkout,
a regular package called ``platform`` or ``datasets`` would shadow the standard library's, or the popular one), and
Python does not look for a package outside its parent's folder; so the three are set up here, alike for a checkout
(editable install) and for a wheel. Each lists its public names in ``api.py``, from which
``copernicus.models.create_model`` is fetched at first use: importing a package costs nothing.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent


def _package(name: str) -> ModuleType:
    installed = _HERE / name
    folder = installed if installed.is_dir() else _HERE.parents[1] / name
    spec = importlib.machinery.ModuleSpec(f"{__name__}.{name}", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)

    def __getattr__(attribute: str) -> Any:  # PEP 562
        # A module that is not imported yet is asked for here first (``from copernicus.datasets import stores``): it is not
        # to cost the import of all that has a public name.
        is_module = (folder / f"{attribute}.py").exists() or (folder / attribute).is_dir()
        if attribute.startswith("__") or is_module or not (folder / "api.py").exists():
            raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")
        api = importlib.import_module(f"{module.__name__}.api")
        if attribute not in api.__all__:
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {attribute!r}; it has {sorted(api.__all__)}"
            )
        return getattr(api, attribute)

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    sys.modules[spec.name] = module
    return module


platform = _package("platform")
models = _package("models")
datasets = _package("datasets")
