"""equalize keeps separate Keras variables equal, or close, while a model trains."""

from equalize import callbacks, constraints, errors, regularizers, views
from equalize._version import __version__
from equalize.groups import Group
from equalize.members import Member
from equalize.registry import GroupRegistry

__all__ = [
    "Group",
    "GroupRegistry",
    "Member",
    "__version__",
    "callbacks",
    "constraints",
    "errors",
    "regularizers",
    "views",
]
