"""equalize keeps separate Keras variables equal, or close, while a model trains."""

from equalize import callbacks, constraints, errors, optimizers, regularizers, views
from equalize._version import __version__
from equalize.groups import Group
from equalize.members import Member
from equalize.registry import GroupRegistry
from equalize.sharing import relation, share

__all__ = [
    "Group",
    "GroupRegistry",
    "Member",
    "__version__",
    "callbacks",
    "constraints",
    "errors",
    "optimizers",
    "regularizers",
    "relation",
    "share",
    "views",
]
