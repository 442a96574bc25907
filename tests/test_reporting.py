import keras
import numpy as np

import equalize
from equalize import reporting
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
    assert f"{registry['soft'].spread():g}" in text
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
    assert (reporting.weights_stored([held]), reporting.weights_free([held])) == (40, 0)
    assert (reporting.weights_stored([near]), reporting.weights_free([near])) == (20, 20)
    assert "(anchor)" in printed(registry)


def test_an_empty_registry_has_a_summary():
    assert "Total: 0 groups, 0 weights stored, 0 weights free" in printed(equalize.GroupRegistry())
