"""The errors that equalize raises about ties.

Below `EqualizeError` there are `NotLinkedError`, `GroupMismatchError` and `TieBrokenError`. All are `ValueError`s, so
that code written for Keras's own errors catches them. An argument of the wrong type is a `TypeError`. A message says
what is wrong, what was expected, what was received and how to fix it, and what raised it has changed nothing.
"""

__all__ = ["EqualizeError", "GroupMismatchError", "NotLinkedError", "TieBrokenError"]


class EqualizeError(ValueError):
    """Base of every error that equalize raises about ties.

    Raised itself for arguments that are out of range, for unknown group names, and for steps that
    cannot reach a member.

    Example:
    >>> import equalize
    >>> try:
    ...     equalize.constraints.Equal("towers", rate=2.0)
    ... except equalize.errors.EqualizeError as error:
    ...     print(error)
    `rate` must be a finite number in (0, 1]. Received: 2.0 of type <class 'float'>.
    """


class NotLinkedError(EqualizeError):
    """A rule is used, or a model offered, before there is anything to link: no `link`, no rule, no weights.

    Training with a rule that no registry has linked would tie nothing. Call `equalize.GroupRegistry().link(model)`
    once the model is built, and again after loading or cloning it.

    Example:
    >>> import keras, equalize
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> try:
    ...     equalize.GroupRegistry().link(model)
    ... except equalize.errors.NotLinkedError as error:
    ...     print(str(error).startswith("No rule was found"))
    True
    """


class GroupMismatchError(EqualizeError):
    """The members of a group do not fit together: shapes, dtypes, rules, anchors, or the groups themselves.

    The message lists every member with its path, shape and dtype. A kernel that should be the transpose of another
    needs a view, `(decoder.kernel, equalize.views.Transpose())`.

    Example:
    >>> import keras, equalize
    >>> encoder, decoder = keras.layers.Dense(2), keras.layers.Dense(3)
    >>> model = keras.Sequential([keras.Input((3,)), encoder, decoder])
    >>> registry = equalize.GroupRegistry()
    >>> try:
    ...     registry.tie("pair", [encoder.kernel, decoder.kernel], equalize.constraints.Equal())
    ... except equalize.errors.GroupMismatchError as error:
    ...     print("Give it a view" in str(error), list(registry))
    True []
    """


class TieBrokenError(EqualizeError):
    """The members of a group that must be equal are not.

    Raised where equality is asked for: by `GroupRegistry.check`, by `initial="strict"`, and by `TiedOptimizer` when
    it makes its slots. After averaging of weights (`use_ema`) `registry.sync("mean")` makes the members equal again;
    after loading weights that differ `registry.sync()` does, with the value of the first.

    Example:
    >>> import keras, equalize
    >>> first, second = keras.layers.Dense(2), keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((2,)), first, second])
    >>> registry = equalize.GroupRegistry()
    >>> group = registry.tie("pair", [first.kernel, second.kernel], equalize.constraints.Equal())
    >>> changed = first.kernel.assign(keras.ops.ones((2, 2)))  # behind the back of the tie
    >>> try:
    ...     registry.check()
    ... except equalize.errors.TieBrokenError as error:
    ...     registry.sync()
    >>> registry.spread()
    {'pair': 0.0}
    """
