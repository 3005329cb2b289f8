"""The reference is read from source files without torch, and says what Python itself would say."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module

import pytest
from sphinx.errors import ExtensionError

import minipact
import static_reference
from helpers import ROOT


def described() -> Iterator[tuple[str, str, list[str]]]:
    """Module, name and methods of everything that the reference describes."""
    module = "minipact"
    for line in (ROOT / "book" / "reference.md").read_text().splitlines():
        if found := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.match(r"\.\. auto\w+:: (\w+)", line):
            entry = (module, found[1], [])
            yield entry
        elif found := re.match(r" +:members: (.*)", line):
            entry[2].extend(found[1].split(", "))


ENTRIES = list(described())


@pytest.mark.parametrize(("module", "name", "methods"), ENTRIES, ids=lambda x: str(x)[:30])
def test_docstrings_and_arguments_are_those_of_the_module(
    module: str, name: str, methods: list[str]
):
    thing = getattr(import_module(module), name)
    home, node = static_reference.definition(module, name)
    assert ast.get_docstring(node) == inspect.getdoc(thing)
    pairs = [(thing, node, False)] if inspect.isfunction(thing) else []
    for method in methods:
        found = static_reference.member(home, node, method)
        assert ast.get_docstring(found) == inspect.getdoc(getattr(thing, method))
        if static_reference.kind(found)[0] == "method":
            pairs.append((getattr(thing, method), found, True))
    for function, found, is_method in pairs:
        text = static_reference.signature(home, found, is_method)
        names = {*inspect.signature(function).parameters} - {"self"}
        arguments = ast.parse(f"def f{text}: pass").body[0].args
        found = [*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        assert {x.arg for x in found if x} == names


def test_decorated_functions_keep_their_arguments():
    home, node = static_reference.definition("minipact", "pact")
    assert home == "minipact.methods"
    text = static_reference.signature(home, node, method=False)
    assert text.startswith("(W0, D, *, core=0.05, task=0.04, tol=0.001, strength=1.0")


def test_what_is_not_there_or_says_nothing_stops_the_build():
    with pytest.raises(ExtensionError, match="minipact has no function or class nothing"):
        static_reference.definition("minipact", "nothing")
    with pytest.raises(ExtensionError, match="f has no docstring"):
        static_reference.docstring(ast.parse("def f(): pass").body[0], "function")


def test_it_knows_the_rooms_of_the_package():
    homes = {name: f"minipact.{room}" for name, room in minipact.HOMES.items()}
    assert static_reference.rooms() == homes
