import keras
import numpy as np
import rich.console

import equalize
from equalize._reports import summary
from tests.conftest import kernels, towers


def printed(registry):
    lines = []
    registry.summary(print_fn=lines.append)
    return "\n".join(lines)


def test_summary_shows_rule_members_shapes_counts_and_spread():
    model = towers(4)
    registry = equalize.GroupRegistry()
    registry.tie("hard", kernels(model)[:3], equalize.constraints.Equal())
    registry.tie("soft", kernels(model)[2:], equalize.regularizers.MeanL2(factor=0.5))
    text = printed(registry)
    for part in ("hard", "Equal()", "soft", "MeanL2(factor=0.5)", "tower_1/kernel (5, 4)", "60", "20", "40"):
        assert part in text
    assert f"{registry['soft'].spread():.3g}" in text
    assert text.rstrip().endswith("Total: 2 groups, 80 weights stored, 40 weights free (50.0%)")
    assert "\x1b" not in text


def test_summary_prints_to_the_terminal_by_default(capsys):
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("pair", kernels(model), equalize.constraints.Equal(rate=0.5, inner=keras.constraints.NonNeg()))
    registry.summary()
    assert "Equal(rate=0.5," in capsys.readouterr().out


def test_names_with_markup_are_printed_as_they_are():
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("[bold]odd[/]", kernels(model), equalize.constraints.Equal())
    assert "[bold]odd[/]" in printed(registry)


def test_anchors_hold_and_constants_do_not_count():
    model = towers(3, frozen=(1,))
    registry = equalize.GroupRegistry()
    registry.tie("held", kernels(model)[:2], equalize.constraints.Equal())
    registry.tie("near", [kernels(model)[2], np.zeros((5, 4), "float32")], equalize.regularizers.MeanL2())
    held, near = registry.values()
    assert (summary.weights_stored([held]), summary.weights_free([held])) == (40, 0)
    assert (summary.weights_stored([near]), summary.weights_free([near])) == (20, 20)
    assert "(anchor)" in printed(registry)


def test_an_empty_registry_has_a_summary():
    assert "Total: 0 groups, 0 weights stored, 0 weights free" in printed(equalize.GroupRegistry())


def many(n=12):
    model = towers(n)
    registry = equalize.GroupRegistry()
    registry.tie("a/rather/long/name/of/a/group", kernels(model), equalize.regularizers.PairwiseNorm(factor=0.125))
    return model, registry


def test_a_log_has_no_escape_codes_and_fits_80_columns_whatever_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    model, registry = many()
    text = printed(registry)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    assert all(f"tower_{i}/kernel" in text for i in range(12))
    lines = []
    x = np.zeros((4, 5), "float32")
    model.compile("sgd", "mse")
    registry.advise(model, x, x[:, :1], print_fn=lines.append)
    assert max(map(len, lines[0].splitlines())) <= 80
    assert lines[0].isascii()


def blocks(n=6):
    """Tied blocks of three layers each, and a group beside them."""
    parts = [
        keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(5, name="a_layer_with_a_long_name"),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.Dense(5, name="out"),
            ],
            name=f"block_{i}",
        )
        for i in range(n)
    ]
    model, registry = keras.Sequential([keras.Input((5,)), *parts, keras.layers.Dense(5)]), equalize.GroupRegistry()
    registry.tie("blocks", parts, equalize.constraints.Equal(), statistics=True)
    registry.tie("alone", [model.layers[-1].kernel, np.ones((5, 5))], equalize.regularizers.MeanL2(factor=0.5))
    return model, registry


def _column(text, place):
    """All lines of a column, one after the other."""
    lines = [line.split("|") for line in text.splitlines() if "|" in line]
    return " ".join(" ".join(cells[place] for cells in lines).split())


def test_a_tie_of_layers_is_one_row_until_it_is_expanded():
    model, registry = blocks()
    text = printed(registry)
    assert "6 weights and 2 statistics x 6 layers" in _column(text, 2)
    assert "a_layer_with_a_long_name" not in text
    assert "MeanL2(factor=0.5)" in text
    assert registry._repr_html_().count("<tr>") == 3
    lines = []
    registry.summary(print_fn=lines.append, expand=True)
    assert _column(lines[0], 2).count("block_5/") == 8
    whole = _column(lines[0], 2).replace(" ", "")
    assert all(f"block_{i}/a_layer_with_a_long_name/kernel(5,5)" in whole for i in range(6))
    assert max(map(len, lines[0].splitlines())) <= 80
    assert registry.count_params(model) == (model.count_params(), 5 * 5 * 2 + 5 * 4 + 30)


def test_names_are_broken_where_they_have_parts():
    wrapped = summary._wrapped("functional_1/encoder_layer/self_attention/query/kernel (64, 64)", 18)
    assert wrapped.split("\n") == [
        "functional_1/",
        "encoder_layer/",
        "self_attention/",
        "query/kernel",
        "(64, 64)",
    ]
    assert summary._wrapped("x" * 20, 8).split("\n") == ["x" * 8, "x" * 8, "x" * 4]
    assert summary._wrapped("", 8) == ""


def test_params_are_counted_with_anchors_views_and_what_is_frozen():
    model = towers(3, frozen=(1,))
    registry = equalize.GroupRegistry()
    everything, free = registry.count_params(model)
    assert (everything, free) == (model.count_params(), 24 * 2 + 13)
    registry.tie("held", kernels(model)[:2], equalize.constraints.Equal())
    assert registry.count_params(model) == (everything, free - 20)
    registry.untie()
    part = equalize.views.Slice((0, 0), (2, 4))
    registry.tie("part", [(kernels(model)[0], part), (kernels(model)[2], part)], equalize.constraints.Equal())
    assert registry.count_params(model) == (everything, free - 8)
    registry.replace("part", equalize.regularizers.MeanL2(factor=0.1))
    assert registry.count_params(model) == (everything, free)


def test_a_terminal_shows_color_and_a_pipe_does_not(monkeypatch, capsys):
    model, registry = many(2)
    registry.summary()
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    registry.summary()
    assert "\x1b" in capsys.readouterr().out
    del model


def test_a_notebook_shows_a_table_with_names_as_they_are():
    model = towers(2)
    registry = equalize.GroupRegistry()
    registry.tie("<script>", kernels(model), equalize.constraints.Equal())
    html = registry._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert html.count("<tr>") == 2
    assert "tower_0/kernel (5, 4)<br>tower_1/kernel (5, 4)" in html
    assert "Total: 1 group, 40 weights stored, 20 weights free (50.0%)" in html


def test_rich_shows_the_table():
    model, registry = many(2)
    console = rich.console.Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(registry)
    assert "Total: 1 group," in capture.get()
    assert "Members" in capture.get()
    del model


def test_a_bar_shows_on_a_terminal_while_the_data_are_asked_and_nowhere_else(monkeypatch, capfd):
    model, registry = many(2)
    model.compile("sgd", "mse")
    x = np.zeros((4, 5), "float32")
    registry.advise(model, x, x[:, :1], print_fn=lambda text: None)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    registry.advise(model, x, x[:, :1], batch_size=1, print_fn=lambda text: None)
    assert "Asking the data" in capfd.readouterr().err
