import types

import keras
import numpy as np
import pytest

import equalize
from equalize._reports import plots
from equalize.constraints import Equal
from equalize.regularizers import ChainL2, MeanL2
from tests.conftest import data, kernels, towers

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as they are drawn."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), savefig(figure, *a, **k)))
    return figures


def tied():
    model = towers(4, frozen=(3,))
    registry = equalize.GroupRegistry()
    registry.tie("hard", kernels(model)[:2], Equal())
    registry.tie("soft", kernels(model), MeanL2(factor=0.5))
    return model, registry


def texts(figure):
    from matplotlib.text import Text

    return {text.get_text() for text in figure.findobj(Text)}


def test_the_picture_names_groups_rules_layers_and_spreads(tmp_path, drawn):
    model, registry = tied()
    registry.plot(tmp_path / "ties.png")
    assert (tmp_path / "ties.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    written = " ".join(texts(figure))
    for part in ("hard", "Equal()", "MeanL2(factor=0.5)", *(f"tower_{i}" for i in range(4))):
        assert part in written
    assert f"soft: spread {registry['soft'].spread():.3g}" in written
    del model


def test_a_tie_of_layers_is_one_row_and_only_what_is_apart_has_a_map(tmp_path, drawn):
    from matplotlib.image import AxesImage

    parts = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(3)]) for _ in range(3)]
    model = keras.Sequential([keras.Input((3,)), *parts])
    registry = equalize.GroupRegistry()
    registry.tie("blocks", parts, Equal())
    registry.plot(tmp_path / "equal.png")
    registry.tie("soft", [part.layers[0].kernel for part in parts], MeanL2())
    parts[1].layers[0].kernel.assign(np.ones((3, 3)))
    registry.plot(tmp_path / "apart.png")
    equal, apart = drawn
    assert equal.findobj(AxesImage) == []
    assert len(apart.axes) == 4  # the rows, the maps of the tie and of the group, which has the kernel as well, a scale
    (rows,) = [axes.get_yticklabels() for axes in equal.axes]
    assert [label.get_text() for label in rows] == ["blocks   Equal()"]
    assert {part.name for part in parts} <= texts(equal)
    (legend,) = equal.legends
    assert [text.get_text() for text in legend.get_texts()] == ["kept equal, bit for bit"]
    assert model.built


@pytest.mark.parametrize("count", [1, 16, 200])
def test_a_picture_fits_a_page_whatever_the_number_of_groups(count, tmp_path, drawn):
    registry = equalize.GroupRegistry()
    variables = [keras.Variable(np.full((2, 2), float(i)), name=f"v{i}") for i in range(2 * count)]
    for i in range(count):
        registry.tie(f"group {i}", variables[2 * i : 2 * i + 2], MeanL2())
    registry.plot(tmp_path / "ties.png")
    width, height = drawn[0].get_size_inches()
    assert width <= 10
    assert height <= 13
    assert ("160 more ties are not shown" in " ".join(texts(drawn[0]))) == (count == 200)


def test_the_layer_of_several_weights_is_the_innermost_that_has_them():
    def common(*paths):
        return plots._common_layer([types.SimpleNamespace(path=path) for path in paths])

    assert common("tower/block/query/kernel", "tower/block/key/kernel") == "tower/block"
    assert common("one/dense/kernel", "two/dense/bias") == "one/dense"  # none has both: that of the first


def test_a_heat_map_holds_the_largest_difference_of_each_pair_of_members():
    model, registry = tied()
    steps = []
    distances = plots._distances(registry["soft"], lambda: steps.append(1))
    values = [keras.ops.convert_to_numpy(kernel.value) for kernel in kernels(model)]
    expected = [[np.max(np.abs(one - two)) for two in values] for one in values]
    np.testing.assert_array_equal(distances, np.array(expected))
    assert distances.max() == pytest.approx(registry["soft"].spread(), rel=1e-6)
    assert len(steps) == 4
    assert not plots._distances(registry["hard"], lambda: None).any()


def test_members_are_compared_through_their_views():
    one, two = (
        keras.Variable(np.arange(6.0).reshape(shape), name=name) for shape, name in (((2, 3), "a"), ((3, 2), "b"))
    )
    two.assign(np.arange(6.0).reshape(2, 3).T + np.float32([[0, 0], [0, 5], [0, 0]]))
    registry = equalize.GroupRegistry()
    group = registry.tie("pair", [one, (two, equalize.views.Transpose())], MeanL2())
    assert plots._distances(group, lambda: None)[0, 1] == 5.0


@pytest.mark.slow
def test_many_groups_and_members_and_what_is_not_a_number(tmp_path, drawn):
    model = towers(20)
    layers = [model.get_layer(f"tower_{i}") for i in range(20)]
    registry = equalize.GroupRegistry()
    registry.tie("towers", layers, ChainL2())
    for i in range(5):
        registry.tie(
            f"a group with a name that is rather longer than one likes {i}",
            [layer.kernel for layer in layers[i : i + 3]],
            MeanL2(),
        )
    kernels(model)[0].assign(np.full((5, 4), np.nan))
    registry.plot(tmp_path / "ties.svg")
    assert (tmp_path / "ties.svg").stat().st_size > 0
    written = texts(drawn[0])
    assert "towers: spread inf" in written
    assert any(text.startswith("…") for text in written)


def test_the_history_of_a_monitor_is_one_line_for_each_history_with_its_name_at_the_end(tmp_path, drawn):
    model, registry = tied()
    registry.tie("also hard", [layer.bias for layer in model.layers[1:3]], Equal())
    monitor = equalize.callbacks.TieMonitor(registry)
    model.compile("sgd", "mse")
    history = model.fit(*data(), epochs=3, verbose=0, callbacks=[monitor])
    assert monitor.history == {name: history.history[f"spread/{name}"] for name in registry}
    monitor.plot(tmp_path / "spread.png")
    (axes,) = drawn[0].axes
    assert sorted(len(line.get_ydata()) for line in axes.lines) == [3, 3]
    assert {"soft", "hard, also hard"} <= texts(drawn[0])
    model.fit(*data(), epochs=1, verbose=0, callbacks=[monitor])
    assert all(len(spreads) == 1 for spreads in monitor.history.values())


def test_names_at_the_ends_of_lines_do_not_cover_each_other(tmp_path, drawn):
    plots.plot_spread({f"group {i}": [1.0, 0.5 + 1e-4 * i] for i in range(6)}, tmp_path / "spread.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = drawn[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]  # without the lines to the names
    assert len(boxes) == 6
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])
