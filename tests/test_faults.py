"""Runs that are killed, disks that are full: what is taken up again is tied, and goes on as if nothing had been."""

import contextlib
import inspect
import os
import pathlib
import resource
import signal

import keras
import pytest

import equalize
from equalize.optimizers import TiedOptimizer
from tests.conftest import in_new_process
from tests.test_durability import compiled, momentum, state, train

pytestmark = pytest.mark.slow

EPOCHS, STEPS, WHOLE = 4, 4, 2  # a run is killed when two epochs are done
SAFE = inspect.signature(keras.callbacks.BackupAndRestore).parameters.keys() & {"double_checkpoint"}  # not Keras 3.5
DOUBLE = dict.fromkeys(SAFE, True)


def hard():
    return compiled()


def exact():
    model, registry = compiled()
    model.compile(TiedOptimizer(momentum(), registry), "mse")
    model.optimizer.build(model.trainable_variables)
    return model, registry


def writers(model, folder):
    """The ways to keep a run, in the order in which they write at the end of an epoch."""

    def replace(epoch, logs):
        model.save(f"{folder}/next.keras")
        os.replace(f"{folder}/next.keras", f"{folder}/last.keras")

    return {
        "backup": keras.callbacks.BackupAndRestore(f"{folder}/backup", **DOUBLE),
        "numbered": keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch:03d}}.keras"),
        "replaced": keras.callbacks.LambdaCallback(on_epoch_end=replace),
    }


class Kill(keras.callbacks.Callback):
    """Kills the process at a step of the third epoch, or right after the second."""

    def __init__(self, step=None):
        super().__init__()
        self.step = step

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == WHOLE and batch == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == WHOLE and self.step is None:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder, way, step):
    model, registry = {"hard": hard, "exact": exact}[way]()
    batches = keras.callbacks.BackupAndRestore(f"{folder}/batches", save_freq=3)
    kill = Kill(None if step == "None" else int(step))
    train(model, registry, *writers(model, folder).values(), batches, kill, epochs=EPOCHS)


def train_and_die_writing(folder, writer):
    """The head's variables are among those that are in the file when the process is killed."""
    model, registry = hard()
    callbacks = writers(model, folder)
    head, written = model.get_layer("head"), []
    save = head.save_own_variables

    def save_and_die(store):
        save(store)
        written.append(store)
        if len(written) == WHOLE * len(callbacks) + list(callbacks).index(writer) + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    head.save_own_variables = save_and_die
    train(model, registry, *callbacks.values(), epochs=EPOCHS)


def unbroken(way):
    model, registry = way()
    train(model, registry, epochs=EPOCHS)
    return state(model)


def from_backup(folder, way=hard):
    model, registry = way()
    for variable in model.variables:
        variable.assign(keras.ops.zeros_like(variable.value))
    backup = keras.callbacks.BackupAndRestore(str(folder), **DOUBLE)
    epochs = len(train(model, registry, backup, epochs=EPOCHS)["loss"])
    registry.check()
    return state(model), epochs


def from_file(file, way=hard):
    model = keras.models.load_model(file)
    registry = model.optimizer.registry if way is exact else equalize.GroupRegistry()
    registry.link(model, initial="strict")
    done = int(model.optimizer.iterations) // STEPS
    train(model, registry, epochs=EPOCHS, initial_epoch=done)
    registry.check()
    return state(model), EPOCHS - done


@pytest.mark.parametrize(("way", "step"), [(hard, 2), (exact, None)], ids=["hard, amid an epoch", "exact, after it"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(way, step, tmp_path):
    assert in_new_process(train_and_die, tmp_path, way.__name__, step) == -signal.SIGKILL
    expected = unbroken(way), EPOCHS - WHOLE
    assert from_backup(tmp_path / "backup", way) == expected
    assert from_file(tmp_path / f"{WHOLE:03d}.keras", way) == expected
    assert from_file(tmp_path / "last.keras", way) == expected
    if step is not None:  # Keras starts the epoch of a backup amid one again: tied, and other numbers
        values, epochs = from_backup(tmp_path / "batches", way)
        assert epochs == EPOCHS - WHOLE
        assert values != expected[0]


@pytest.mark.parametrize("writer", ["backup", "numbered", "replaced"])
def test_a_run_that_was_killed_while_it_wrote_goes_on_from_what_was_whole(writer, tmp_path):
    assert in_new_process(train_and_die_writing, tmp_path, writer) == -signal.SIGKILL
    expected = unbroken(hard)
    if writer == "backup" and not DOUBLE:
        with pytest.raises(OSError, match="open file"):
            from_backup(tmp_path / "backup")
    elif writer == "backup":
        assert from_backup(tmp_path / "backup") == (expected, EPOCHS - WHOLE)
    elif writer == "numbered":
        with pytest.raises(ValueError, match=r"\.keras"):
            keras.models.load_model(tmp_path / f"{WHOLE + 1:03d}.keras")
        assert from_file(tmp_path / f"{WHOLE:03d}.keras") == (expected, EPOCHS - WHOLE)
    else:
        with pytest.raises(ValueError, match=r"\.keras"):
            keras.models.load_model(tmp_path / "next.keras")
        assert from_file(tmp_path / "last.keras") == (expected, EPOCHS - WHOLE)


@contextlib.contextmanager
def full_disk(left):
    """While open, no file can grow beyond `left` bytes; Python ignores the signal, so that writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("way", [hard, exact])
def test_a_full_disk_is_an_error_that_leaves_the_old_file_and_the_ties(way, tmp_path):
    model, registry = way()
    replace = writers(model, tmp_path)["replaced"]
    train(model, registry, replace, epochs=WHOLE)
    whole, before = (tmp_path / "last.keras").read_bytes(), state(model)
    with full_disk(len(whole) // 2), pytest.raises(OSError, match="File too large"):
        replace.on_epoch_end(WHOLE, {})
    assert (tmp_path / "last.keras").read_bytes() == whole
    assert state(model) == before
    registry.check()
    expected = unbroken(way), EPOCHS - WHOLE
    assert from_file(tmp_path / "last.keras", way) == expected
    train(model, registry, replace, epochs=EPOCHS, initial_epoch=WHOLE)  # there is room again
    assert state(model) == expected[0]
    assert sorted(path.name for path in pathlib.Path(tmp_path).iterdir()) == ["last.keras"]


def test_a_file_in_place_is_lost_when_the_disk_is_full(tmp_path):
    """Which is why docs/saving.md writes beside it: Keras empties the old file before it writes."""
    model, _ = hard()
    model.save(tmp_path / "model.keras")
    with full_disk(2000), pytest.raises(OSError, match="File too large"):
        model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"\.keras"):
        keras.models.load_model(tmp_path / "model.keras")
