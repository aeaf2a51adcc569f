"""What a party trains: the public names for a task of your own.

They load on first use (PEP 562), since importing this package, or its registry, must not cost an import of torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker_fl.tasks.image_classification import ImageArrays, ImageClassification
    from broker_fl.tasks.scattered_images import ScatteredImages
    from broker_fl.tasks.task import Examples, Task

__all__ = ["Examples", "ImageArrays", "ImageClassification", "ScatteredImages", "Task"]

_ROOMS = {
    "Examples": "broker_fl.tasks.task",
    "ImageArrays": "broker_fl.tasks.image_classification",
    "ImageClassification": "broker_fl.tasks.image_classification",
    "ScatteredImages": "broker_fl.tasks.scattered_images",
    "Task": "broker_fl.tasks.task",
}


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)
