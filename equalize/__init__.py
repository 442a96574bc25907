"""equalize keeps separate Keras variables equal, or close, while a model trains.

A *group* says who is tied, a *rule* how: `equalize.constraints` makes its members equal after every optimizer step,
`equalize.regularizers` pulls them together by the loss, and `equalize.optimizers.TiedOptimizer` trains them as one.
`GroupRegistry` holds the groups. A *view* of `equalize.views` says how a member shows the group's common value.
`compare` tells which way to tie is best for a model and its data.

Example:
>>> import keras, equalize
>>> inputs = keras.Input((8,))
>>> left = keras.layers.Dense(4, kernel_constraint=equalize.constraints.Equal("towers"))
>>> right = keras.layers.Dense(4, kernel_constraint=equalize.constraints.Equal("towers"))
>>> model = keras.Model(inputs, [left(inputs), right(inputs)])
>>> registry = equalize.GroupRegistry().link(model)  # finds the members, checks them, makes them equal
>>> equalize.relation(left.kernel, right.kernel)
'equal'
"""

from equalize import callbacks, constraints, errors, optimizers, reductions, regularizers, saving, views
from equalize._ties.group import Group
from equalize._ties.member import Member
from equalize._version import __version__
from equalize.comparison import Comparison, compare
from equalize.registry import GroupRegistry
from equalize.sharing import relation, share

__all__ = [
    "Comparison",
    "Group",
    "GroupRegistry",
    "Member",
    "__version__",
    "callbacks",
    "compare",
    "constraints",
    "errors",
    "optimizers",
    "reductions",
    "regularizers",
    "relation",
    "saving",
    "share",
    "views",
]
