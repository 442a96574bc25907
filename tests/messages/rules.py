"""What rules say of wrong arguments."""

from equalize.constraints import Equal, Invariant
from equalize.regularizers import MeanL2, PairwiseL2
from equalize.views import Flip
from tests.messages import kernels, message


@message(
    """
    `group` must not be empty. Expected the name of a group. Received: '' of type <class 'str'>.
    """
)
def empty_group():
    Equal("")


@message(
    """
    `group` must be a string, the name of a group (the rate goes by name: `Equal(rate=...)`). Received:
    0.1 of type <class 'float'>.
    """
)
def rate_in_the_place_of_the_group():
    Equal(0.1)


@message(
    """
    `group` must be a string, the name of a group (the factor goes by name: `MeanL2(factor=...)`).
    Received: 0.1 of type <class 'float'>.
    """
)
def factor_in_the_place_of_the_group():
    MeanL2(0.1)


@message(
    """
    `rate` must be a finite number in (0, 1]. Received: 2.0 of type <class 'float'>.
    """
)
def rate_out_of_range():
    Equal("pair", rate=2.0)


@message(
    """
    `factor` must be a finite number in [0, inf). Received: -1.0 of type <class 'float'>.
    """
)
def factor_out_of_range():
    MeanL2("pair", -1.0)


@message(
    """
    `rate` must be a number. Received: 'half' of type <class 'str'>.
    """
)
def rate_of_another_type():
    Equal("pair", rate="half")


@message(
    """
    `view` must be a view of `equalize.views`, for instance `Transpose()`. Received: 'Transpose' of type
    <class 'str'>.
    """
)
def view_of_another_type():
    Equal("pair", view="Transpose")


@message(
    """
    `inner` must be a Keras constraint, its config or its name. Received: 'no such constraint' of type
    <class 'str'>.
    """
)
def inner_that_is_none():
    Equal("pair", inner="no such constraint")


@message(
    """
    `inner` must not tie. Received: <Equal() of group 'other'> of type <class
    'equalize.constraints.Equal'>. Give the layer the rule itself, with this constraint as its `inner`.
    """
)
def inner_that_ties():
    Invariant([Flip(0)], inner=Equal("other"))


@message(
    """
    Equal(group='pair') on 'left/kernel' has never been linked, so it ties nothing. Expected: a registry
    that knows the model before training starts. Call `equalize.GroupRegistry().link(model)` once the
    model is built (and again after loading or cloning it).
    """
)
def rule_that_was_never_linked():
    (kernel,) = kernels("left")
    Equal("pair")(kernel)


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received rows of different lengths: [[0, 1], [1]] of type <class 'list'>.
    """
)
def matrix_with_rows_of_different_lengths():
    PairwiseL2(factor=[[0, 1], [1]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received: [['a', 'b'], ['b', 'a']] of type <class 'list'>.
    """
)
def matrix_of_another_type():
    PairwiseL2(factor=[["a", "b"], ["b", "a"]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Received an array of shape (2, 3).
    """
)
def matrix_that_is_not_square():
    PairwiseL2(factor=[[0, 1, 2], [1, 0, 2]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Expected what the transposed entry is; received 1 in row 0 and column 1, and 2 in row 1 and column
    0.
    """
)
def matrix_that_is_not_symmetric():
    PairwiseL2(factor=[[0, 1], [2, 0]])


@message(
    """
    `factor` must be a number, or a symmetric matrix of them with a row and a column for each member.
    Expected finite numbers that are not negative; received -1 in row 0 and column 1, and -1 in row 1
    and column 0.
    """
)
def matrix_with_a_negative_entry():
    PairwiseL2(factor=[[0, -1], [-1, 0]])


@message(
    """
    `views` must be a list of views. Received: Flip(axes=[0]) of type <class 'equalize.views.Flip'>.
    """
)
def views_that_are_no_list():
    Invariant(Flip(0))


@message(
    """
    `views` must hold at least one view. Received: [] of type <class 'list'>.
    """
)
def no_views():
    Invariant([])


@message(
    """
    `views` must be a list of views. Received: [Flip(axes=[0]), None] of type <class 'list'>.
    """
)
def views_that_hold_none():
    Invariant([Flip(0), None])


@message(
    """
    `inner` must be a Keras regularizer, its config or its name. Received: <built-in function print> of
    type <class 'builtin_function_or_method'>.
    """
)
def inner_of_another_type():
    MeanL2("pair", inner=print)
