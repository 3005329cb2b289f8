"""The reference read from source files, so that building the pages needs no torch.

autofunction, autoclass and autoexception as in sphinx.ext.autodoc, with signatures that name no types.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
Definition = ast.FunctionDef | ast.ClassDef
STYLE = Config(napoleon_use_rtype=False)


@cache
def parsed(module: str) -> ast.Module:
    """Syntax tree of a module of this repository."""
    file = ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def rooms() -> dict[str, str]:
    """Public name -> module, from the table in minipact/__init__.py."""
    for node in parsed("minipact").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            found = ast.literal_eval(node.value)
            return {n: f"minipact.{room}" for room, names in found.items() for n in names.split()}
    raise ExtensionError("minipact/__init__.py has no ROOMS")


def definition(module: str, name: str) -> tuple[str, Definition]:
    """Home and syntax tree of a function or class, by the name under which a module offers it."""
    if module == "minipact":
        module = rooms().get(name, module)
    for node in parsed(module).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
    for node in parsed(module).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(str(node.module), name)
    raise ExtensionError(f"{module} has no function or class {name}")


def member(module: str, owner: ast.ClassDef, name: str) -> ast.FunctionDef:
    """A method of a class, or of those that it inherits from here."""
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    for base in owner.bases:
        if isinstance(base, ast.Name):
            return member(module, definition(module, base.id)[1], name)
    raise ExtensionError(f"{module}.{owner.name} has no method {name}")


def constants(module: str) -> dict[str, ast.expr]:
    """Values of a module's names that are plain numbers or texts."""
    pairs = [n for n in parsed(module).body if isinstance(n, ast.Assign | ast.AnnAssign)]
    named = {ast.unparse(n.targets[0] if isinstance(n, ast.Assign) else n.target): n for n in pairs}
    return {name: n.value for name, n in named.items() if isinstance(n.value, ast.Constant)}


def signature(module: str, function: ast.FunctionDef, method: bool) -> str:
    """Arguments in parentheses, without types and without self; constants as their values."""
    arguments = ast.parse(f"def f({ast.unparse(function.args)}): pass").body[0].args
    known = constants(module)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    values = [arguments.defaults, arguments.kw_defaults]
    for row in values:
        row[:] = [known.get(v.id, v) if isinstance(v, ast.Name) else v for v in row]
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    if method and not static:
        del (arguments.posonlyargs or arguments.args)[0]
    return f"({ast.unparse(arguments)})"


def kind(function: ast.FunctionDef) -> tuple[str, str]:
    """Directive and option that describe a method."""
    names = {ast.unparse(d).rpartition(".")[2] for d in function.decorator_list}
    if names & {"property", "cached_property"}:
        return "property", ""
    return "method", next(iter(names & {"classmethod", "staticmethod"}), "")


def docstring(node: Definition, what: str) -> list[str]:
    """A docstring with its Google-style sections as reStructuredText."""
    text = ast.get_docstring(node)
    if not text:
        raise ExtensionError(f"{node.name} has no docstring")
    return GoogleDocstring(text, config=STYLE, what=what, name=node.name).lines()


def described(what: str, heading: str, options: list[str], body: list[str]) -> list[str]:
    """Lines of a directive of the Python domain."""
    inner = [f":{option}" for option in options] + ["", *body, ""]
    return [f".. py:{what}:: {heading}", *(f"   {line}".rstrip() for line in inner)]


class Reference(SphinxDirective):
    """Describes one function, class or exception of the module named by currentmodule."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"members": directives.unchanged}  # noqa: RUF012  as docutils wants it

    def run(self) -> list[nodes.Node]:
        what = self.name.removeprefix("auto")
        name, bracket, rest = self.arguments[0].partition("(")
        module = self.env.ref_context.get("py:module", "minipact")
        home, node = definition(module, name)
        self.env.note_dependency(str(ROOT.joinpath(*home.split(".")).with_suffix(".py")))
        given = bracket + rest
        if isinstance(node, ast.FunctionDef):
            given = signature(home, node, method=False)
        body = [*docstring(node, what), ""]
        for method in self.methods(home, node):
            directive, option = kind(method)
            shown = "" if directive == "property" else signature(home, method, method=True)
            text = docstring(method, "method")
            body += described(
                directive, method.name + shown, [f"{option}:"] if option else [], text
            )
        lines = described(what, name + given, [f"module: {module}"], body)
        found = nodes.Element()
        self.state.nested_parse(StringList(lines, source=home), self.content_offset, found)
        return found.children

    def methods(self, module: str, node: Definition) -> list[ast.FunctionDef]:
        names = [name.strip() for name in self.options.get("members", "").split(",")]
        found = [member(module, node, name) for name in names if name]
        return sorted(found, key=lambda method: method.lineno)


def setup(app: Sphinx) -> dict[str, bool]:
    for what in ("function", "class", "exception"):
        app.add_directive(f"auto{what}", Reference)
    app.config.default_role = "code"  # what stands in single backticks in docstrings
    return {"parallel_read_safe": True, "parallel_write_safe": True}
