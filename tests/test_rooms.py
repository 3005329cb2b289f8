"""The rooms of the package: imports run one way, and no room uses what is private to another."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minipact

FOLDER = Path(minipact.__file__).parent
ROOMS = {path.stem: ast.parse(path.read_text()) for path in sorted(FOLDER.glob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def imports(tree: ast.AST) -> list[tuple[str, str, str]]:
    """What is imported from this package, at the top or inside a function: room, name, name here.

    The name is empty where the room itself is imported.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, room = alias.name.partition(".")
                if package == "minipact":
                    found.append((room or "__init__", "", alias.asname or alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minipact":
            room = node.module.partition(".")[2]
            for alias in node.names:
                here = alias.asname or alias.name
                if room:
                    found.append((room, alias.name, here))
                elif alias.name in ROOMS:
                    found.append((alias.name, "", here))
                else:
                    found.append(("__init__", alias.name, here))
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports name the package"
    return found


def rooms_imported(name: str) -> set[str]:
    return {room for room, _, _ in imports(ROOMS[name])}


@pytest.mark.parametrize("name", ROOMS)
def test_no_room_uses_what_is_private_to_another(name: str):
    taken = [f"{room}.{what}" for room, what, _ in imports(ROOMS[name]) if is_private(what)]
    modules = {here for _, what, here in imports(ROOMS[name]) if not what}
    for node in ast.walk(ROOMS[name]):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner in modules or owner.split(".")[0] == "minipact":
                taken.append(f"{owner}.{node.attr}")
    assert not taken


def test_imports_run_one_way():
    TopologicalSorter(
        {name: rooms_imported(name) for name in ROOMS}
    ).prepare()  # raises for a cycle


@pytest.mark.parametrize("name", ["errors", "low_rank", "plain", "version"])
def test_some_rooms_stand_alone(name: str):
    assert not rooms_imported(name)


def test_the_mathematics_knows_no_engine():
    assert rooms_imported("methods") == {"errors", "low_rank"}
    assert rooms_imported("per_task") <= {"errors", "methods"}
    engine = {"merging", "steps", "recipe", "task_vectors", "job", "xray", "__main__"}
    for name in ("diagnostics", "lbw_weights", "data_statistics", "parallel"):
        assert not rooms_imported(name) & engine


def test_public_names_have_one_home():
    for name, home in minipact.HOMES.items():
        assert hasattr(minipact, name)
        assert name in vars(getattr(minipact, home))


def test_the_engine_knows_the_methods_of_every_room():
    """A room that registers methods is imported by the engine, so that they are known by name."""
    registering = {
        name for name in ROOMS if "register" in {what for _, what, _ in imports(ROOMS[name])}
    }
    assert registering <= rooms_imported("merging")
