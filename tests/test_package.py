import equalize


def test_all_is_what_imports():
    assert all(hasattr(equalize, name) for name in equalize.__all__)
    assert sorted(equalize.__all__) == equalize.__all__


def test_public_names_have_docstrings():
    for module in (equalize.constraints, equalize.regularizers, equalize.errors):
        assert module.__doc__
    for thing in (equalize.Group, equalize.GroupRegistry, equalize.Member, equalize.constraints.Equal):
        assert thing.__doc__
