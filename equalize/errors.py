"""The errors that equalize raises. All are `ValueError`s, so that code written for Keras's own errors catches them."""


class EqualizeError(ValueError):
    """Base of every error that equalize raises about ties."""


class NotLinkedError(EqualizeError):
    """A rule is used, or a model offered, before there is anything to link: no `link`, no rule, no weights."""


class GroupMismatchError(EqualizeError):
    """The members of a group do not fit together: shapes, dtypes, rules, anchors, or the groups themselves."""


class TieBrokenError(EqualizeError):
    """The members of a group that must be equal are not."""
