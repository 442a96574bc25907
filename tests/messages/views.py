"""What views say of what they cannot show."""

import keras
from keras import ops

import equalize
from equalize.constraints import Equal, Invariant
from equalize.views import Chain, Flip, Pattern, Rotate90, Scale, Slice, Transpose
from tests.messages import message, variable


@message(
    """
    `axes` must be a permutation of 0, 1, ..., n − 1. Received: (0, 2) of type <class 'tuple'>.
    """
)
def transpose_by_no_permutation():
    Transpose((0, 2))


@message(
    """
    `axes` must name axes once each, and at least one. Received: () of type <class 'tuple'>.
    """
)
def flip_of_no_axis():
    Flip(())


@message(
    """
    `axes` must be integers. Received: 'rows' of type <class 'str'>.
    """
)
def axes_of_another_type():
    Flip("rows")


@message(
    """
    `axes` must be integers. Received: [0, True] of type <class 'list'>.
    """
)
def axes_among_which_there_is_a_bool():
    Flip([0, True])


@message(
    """
    `axes` must be integers in [-2147483648, 2147483648). Received: 1099511627776 of type <class 'int'>.
    """
)
def axes_that_are_too_large():
    Flip(2**40)


@message(
    """
    `k` must be an integer. Received: 0.5 of type <class 'float'>.
    """
)
def turns_of_another_type():
    Rotate90(0.5)


@message(
    """
    `k` must be an integer. Received: [1] of type <class 'list'>.
    """
)
def turns_in_a_list():
    Rotate90([1])


@message(
    """
    `axes` must be two different axes. Received: (0, 0) of type <class 'tuple'>.
    """
)
def rotation_in_no_plane():
    Rotate90(1, (0, 0))


@message(
    """
    `factor` must be a number. Received: '2' of type <class 'str'>.
    """
)
def scale_of_another_type():
    Scale("2")


@message(
    """
    `factor` must be finite and not 0. Received: 0 of type <class 'int'>. Expected a factor between
    1.1e-19 and 1.8e19 in size.
    """
)
def scale_by_nothing():
    Scale(0)


@message(
    """
    `start_indices` must be non-negative and `shape` positive, with one for each axis. Received:
    start_indices=(0, 0) of type <class 'tuple'>, shape=(4,) of type <class 'tuple'>.
    """
)
def slice_of_nothing():
    Slice((0, 0), (4,))


@message(
    """
    `views` must be views of equalize. Received: 'Transpose' of type <class 'str'>.
    """
)
def chain_of_other_things():
    Chain("Transpose")


@message(
    """
    `Chain` needs a view. Expected: one or more. Received: none.
    """
)
def chain_of_nothing():
    Chain()


@message(
    """
    Cannot tie 'two' into group 'pair': The view Transpose(axes=[0, 2, 1]) does not fit a variable of
    shape (4, 3): expected 3 axes. Change the view, or give it to another variable.
    """
)
def transpose_that_does_not_fit():
    equalize.GroupRegistry().tie(
        "pair", [variable((4, 3), "one"), (variable((4, 3), "two"), Transpose((0, 2, 1)))], Equal()
    )


@message(
    """
    The view Transpose(axes=[0, 2, 1]) does not fit a variable of shape (4, 3): expected 3 axes. Change
    the view, or give it to another variable.
    """
)
def transpose_of_another_number_of_axes():
    Transpose((0, 2, 1)).common_shape((4, 3))


@message(
    """
    The view Flip(axes=[2]) does not fit a variable of shape (4, 3): expected one with the different
    axes [2]. Change the view, or give it to another variable.
    """
)
def flip_that_does_not_fit():
    Flip(2).common_shape((4, 3))


@message(
    """
    The view Rotate90(k=1, axes=[0, 1]) does not fit a variable of shape (4,): expected one with the
    axes [0, 1]. Change the view, or give it to another variable.
    """
)
def rotation_that_does_not_fit():
    Rotate90().common_shape((4,))


@message(
    """
    The view Slice(start_indices=[0, 2], shape=[4, 3]) does not fit a variable of shape (4, 4): expected
    a shape of at least (4, 5). Change the view, or give it to another variable.
    """
)
def slice_that_does_not_fit():
    Slice((0, 2), (4, 3)).common_shape((4, 4))


@message(
    """
    A symmetry of a variable of shape (16777216,) is too large: expected fewer than 2**24 entries,
    received 16777216. Constrain a smaller variable.
    """
)
def symmetry_of_too_much():
    Invariant([Flip(0)])(ops.zeros((2**24,)))


@message(
    """
    The view Transpose(axes=None) takes a variable of shape (4, 3) to another shape, so it is not a
    symmetry of it. Expected: views that keep the shape.
    """
)
def symmetry_that_changes_the_shape():
    Invariant([Transpose()])(ops.zeros((4, 3)))


@message(
    """
    The view Scale(factor=2.0) changes more than the order and signs of entries, so no finite group has
    it. Expected: `Transpose`, `Flip`, `Rotate90`, `Scale(-1)`, or a `Chain` of them.
    """
)
def symmetry_that_changes_values():
    Invariant([Scale(2)])(ops.zeros((4,)))


@message(
    """
    The views [Rotate90(k=1, axes=[0, 1])] do not form a group: Rotate90(k=1, axes=[0, 1]) followed by
    Rotate90(k=1, axes=[0, 1]) is not one of them. Expected: with any two views also the one that they
    make together. Add it.
    """
)
def views_that_form_no_group():
    Invariant([Rotate90(1)])(ops.zeros((3, 3)))


@message(
    """
    Expected the config of a `Chain`, with a list 'views'. Received: {'views': 'Flip'} of type <class
    'dict'>.
    """
)
def chain_from_something_else():
    Chain.from_config({"views": "Flip"})


@message(
    """
    Expected the config of a view, of a class that is registered with
    `keras.saving.register_keras_serializable`. Received: {'class_name': 'Flip'} of type <class 'dict'>.
    """
)
def view_from_something_else():
    Equal("pair", view={"class_name": "Flip"})


@message(
    """
    The config of a view is damaged: Flip.__init__() missing 1 required positional argument: 'axes'.
    Expected: arguments that its class takes. Received: {'module': 'equalize.views', 'class_name':
    'Flip', 'config': {}, 'registered_name': 'equalize>Flip'} of type <class 'dict'>.
    """
)
def view_that_cannot_be_made():
    Equal("pair", view=keras.saving.serialize_keras_object(Flip(0)) | {"config": {}})


@message(
    """
    `indices` must name every entry of the common value. Received: no 1. Number those that are used:
    `used, indices = numpy.unique(indices, return_inverse=True)`.
    """
)
def pattern_that_leaves_an_entry_out():
    Pattern([[0, 2], [2, 0]], (3,))


@message(
    """
    `indices` must be from 0 to 3, the entries of a common value of shape (2, 2). Received: indices from
    0 to 4.
    """
)
def pattern_beyond_the_common_value():
    Pattern([0, 1, 4], (2, 2))


@message(
    """
    `shape` must be positive and `indices` must not be empty. Received: indices=[] of type <class
    'list'>, shape=(0,) of type <class 'tuple'>.
    """
)
def pattern_of_nothing():
    Pattern([], (0,))


@message(
    """
    `indices` must be an array of integers. Received: [0.5, 1.0] of type <class 'list'>.
    """
)
def pattern_of_fractions():
    Pattern([0.5, 1.0], (2,))


@message(
    """
    A `Pattern` must not repeat what a `Slice` leaves free. Expected: the `Pattern` first. Received:
    Chain(Slice(start_indices=[0], shape=[2]), Pattern(<indices of shape (4,)>, shape=[3])).
    """
)
def pattern_of_what_a_slice_leaves_free():
    Chain(Slice((0,), (2,)), Pattern([0, 1, 2, 1], (3,)))


@message(
    """
    The view Pattern(<indices of shape (3,)>, shape=[2]) does not fit a variable of shape (4,): expected
    the shape of its indices, (3,). Change the view, or give it to another variable.
    """
)
def pattern_that_does_not_fit():
    Pattern([0, 1, 1], (2,)).common_shape((4,))
