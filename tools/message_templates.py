"""Every sentence that edgetool can say, read from its source: strings and f-strings as templates with `{1}`, `{2}`.

All text in `src/edgetool` counts that reads like words for people, whatever it is used for on the way to the terminal;
what never gets there is left out by module, by callee and by name below. A string that is a part of a larger
expression (an f-string, a sum, a conditional expression within one) is taken as that whole, once for each way that
the conditions can turn out.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from message_scope import CODE, FIXED, NOT_SHOWN, NOT_SHOWN_CALLEES, NOT_SHOWN_KEYWORDS, NOT_SHOWN_MODULES

from edgetool.commands._blocks import words

SOURCE = Path(__file__).resolve().parent.parent / "src" / "edgetool"

NO_TABLES = {f"commands/{name}.py" for name in ("_options", "_run", "_blocks", "_show_config", "quantize")}
"""Commands' modules whose keys are no names of rows."""

MOST_VARIANTS = 8
PLURAL = "{s}"
HOLE = re.compile(r"\{(?:\d+|s)\}")


@dataclass(frozen=True)
class Hole:
    """A value that is known only when the sentence is said."""


Part = str | Hole
Variant = tuple[Part, ...]


@dataclass
class Module:
    """One parsed file, with what is needed to see through a name."""

    path: str
    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    assigned: dict[tuple[ast.AST, str], list[ast.expr | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self._assign(node, node.targets[0].id, node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self._assign(node, node.target.id, node.value)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                self._assign(node, node.target.id, None)

    def _assign(self, node: ast.AST, name: str, value: ast.expr | None) -> None:
        self.assigned.setdefault((self.scope(node), name), []).append(value)

    def scope(self, node: ast.AST) -> ast.AST:
        """The function around a node, or the module."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                return node
        return self.tree

    def values(self, name: ast.Name) -> list[ast.expr] | None:
        """What a name can stand for, None where that cannot be told."""
        scope = self.scope(name)
        found = self.assigned.get((scope, name.id))
        if found is None and scope is not self.tree:
            given = {a.arg for a in ast.walk(scope) if isinstance(a, ast.arg)}
            found = None if name.id in given else self.assigned.get((self.tree, name.id))
        return None if found is None or None in found else [value for value in found if value is not None]


def templates() -> dict[str, list[str]]:
    """Each template with the places that it comes from (`path:line`)."""
    found: dict[str, list[str]] = {}
    for origin, texts in FIXED.items():
        for text in texts:
            found.setdefault(text, []).append(origin)
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not any(name == left_out or name.startswith(f"{left_out}/") for left_out in NOT_SHOWN_MODULES):
            for template, line in module_templates(path.read_text(encoding="utf-8"), name):
                if template in NOT_SHOWN:
                    continue
                found.setdefault(template, []).append(f"{name}:{line}")
    return found


def module_templates(text: str, name: str) -> Iterator[tuple[str, int]]:
    """The templates of one file with their lines."""
    module = Module(name, ast.parse(text))
    consumed: set[ast.AST] = set()
    whole: list[tuple[ast.expr, list[Variant]]] = []
    for node in ast.walk(module.tree):  # breadth first: the larger expression comes before its parts
        if node in consumed or not isinstance(node, ast.expr) or not _is_text(node) or _left_out(module, node):
            continue
        used: set[ast.AST] = set()
        whole.append((node, _variants(module, node, used)))
        consumed |= used
    for node, variants in whole:
        if node in consumed and not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        for variant in variants:
            template = written(variant)
            fragment = node in consumed and template[:1] in " ,;:("
            if template and not fragment and _for_people(template, node, module):
                yield template, node.lineno
    yield from _documented(module)
    yield from _words(module)


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr)


def _variants(module: Module, node: ast.expr, used: set[ast.AST]) -> list[Variant]:
    """Every way in which an expression of text can turn out; nodes that are a part of it are added to `used`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [(node.value,)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _product([_part(module, side, used) for side in (node.left, node.right)])
    if isinstance(node, ast.JoinedStr):
        parts: list[list[Variant]] = []
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                plain = value.conversion == -1 and value.format_spec is None
                parts.append(_part(module, value.value, used) if plain else [(Hole(),)])
            else:
                used.add(value)
                parts.append([(str(ast.literal_eval(value)),)])
        return _product(parts)
    return [(Hole(),)]


def _part(module: Module, node: ast.expr, used: set[ast.AST]) -> list[Variant]:
    """The same of a part: text, a choice between texts, a name that stands for such, or else a hole."""
    if (isinstance(node, ast.Constant) and isinstance(node.value, str)) or isinstance(node, ast.JoinedStr | ast.BinOp):
        if not _is_text(node):
            return [(Hole(),)]
        used.add(node)
        return _variants(module, node, used)
    if isinstance(node, ast.IfExp):
        if not (_chosen(node.body) and _chosen(node.orelse)):
            return [(Hole(),)]
        sides: list[Variant] = []
        for side in (node.body, node.orelse):
            sides += _part(module, side, used)
        return _plural(sides)
    if isinstance(node, ast.Name) and (values := module.values(node)) and all(_chosen(value) for value in values):
        found: list[Variant] = []
        for value in values:
            found += _part(module, value, used)
        return _plural(found) if len(found) <= MOST_VARIANTS else [(Hole(),)]
    return [(Hole(),)]


def _chosen(node: ast.expr) -> bool:
    return _is_text(node) or (isinstance(node, ast.IfExp) and _chosen(node.body) and _chosen(node.orelse))


def _plural(variants: list[Variant]) -> list[Variant]:
    """`s` or nothing is written as one template, since other languages have no such ending."""
    return [(PLURAL,)] if set(variants) == {("",), ("s",)} else variants


def _product(parts: list[list[Variant]]) -> list[Variant]:
    if len(list(itertools.product(*parts))) > MOST_VARIANTS:
        parts = [options if len(options) == 1 else [(Hole(),)] for options in parts]
    return [tuple(itertools.chain(*chosen)) for chosen in itertools.product(*parts)]


def written(variant: Variant) -> str:
    """A template as the catalogue has it: values numbered, spaces and punctuation around it gone."""
    merged: list[Part] = []
    for part in variant:
        if part == "" or (isinstance(part, Hole) and merged and isinstance(merged[-1], Hole)):
            continue
        merged.append(part)
    number = itertools.count(1)
    text = "".join(f"{{{next(number)}}}" if isinstance(part, Hole) else part for part in merged)
    text = re.sub(r"(?:\{\d+\})+", lambda match: match[0].split("}")[0] + "}", text)
    text = text.removeprefix("error: ")
    stripped = text.strip(" ;,:\n")
    balanced = stripped.count("(") == stripped.count(")")
    bare = re.fullmatch(r"(.*\S) \(\{\d+\}\)", stripped, re.DOTALL)  # what stands in brackets behind is taken off first
    stripped = bare[1] if bare else stripped
    if balanced and stripped.startswith("(") and stripped.endswith(")") and ")" not in stripped[:-1]:
        stripped = stripped[1:-1]
    return renumbered(stripped)


def renumbered(template: str) -> str:
    """Values numbered from one, in their order."""
    number = itertools.count(1)
    return re.sub(r"\{\d+\}", lambda _: f"{{{next(number)}}}", template)


def _for_people(template: str, node: ast.expr, module: Module) -> bool:
    literal = HOLE.sub(" ", template)
    words = re.findall(r"(?<![\w.\-/])[A-Za-z][a-z_']+(?![\w/]|[.-]\w)", literal)
    if CODE.fullmatch(template):
        return False
    parent = module.parents.get(node)
    if isinstance(parent, ast.Call) and ast.unparse(parent.func) == "setting" and " or " in template:
        return True  # 2, 3, 4 or 8
    raised = isinstance(parent, ast.Call) and re.match(r"[A-Z]\w+$|out_of_memory", ast.unparse(parent.func))
    enough = 1 if raised or HOLE.search(template) else 2
    return len(words) >= enough and sum(map(len, words)) >= 3 and " " in template


def _left_out(module: Module, node: ast.AST) -> bool:
    """Docstrings, comparisons, keys, annotations, and arguments of calls that show nothing."""
    child, parent = node, module.parents.get(node)
    first = True
    while parent is not None and not isinstance(parent, ast.stmt):
        if isinstance(parent, ast.Compare | ast.Subscript | ast.FormattedValue) and first:
            return not isinstance(parent, ast.FormattedValue)
        if isinstance(parent, ast.Dict) and child in parent.keys:
            return True
        if isinstance(parent, ast.keyword) and parent.arg in NOT_SHOWN_KEYWORDS:
            return True
        if isinstance(parent, ast.Call) and child is not parent.func:
            callee = ast.unparse(parent.func)
            if NOT_SHOWN_CALLEES.fullmatch(callee):
                return True
            if callee == "setting" and child in parent.args and parent.args.index(child) != 2:
                return True
            if callee.rpartition(".")[2] in {"Option", "Argument"}:
                return False
        if isinstance(parent, ast.arguments):
            return True
        first = first and isinstance(parent, ast.JoinedStr)
        child, parent = parent, module.parents.get(parent)
    return (isinstance(parent, ast.Expr) and isinstance(child, ast.Constant)) or isinstance(parent, ast.Assert)


def _documented(module: Module) -> Iterator[tuple[str, int]]:
    """Help of commands: their docstrings, a paragraph each."""
    for node in ast.walk(module.tree):
        decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
        registered = (module.path, getattr(node, "name", "")) in _registered()
        if registered or any(re.search(r"\bapp\.|\bwith_", one) for one in decorators):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            yield from (
                (" ".join(paragraph.split()), node.lineno) for paragraph in (text or "").split("\n\n") if paragraph
            )


@functools.cache
def _registered() -> set[tuple[str, str]]:
    """Commands that cli.py adds by `app.command("name")(module.function)`: their file and function."""
    table = (SOURCE / "cli.py").read_text(encoding="utf-8")
    found = re.findall(r"app\.command\(.*?\)\((\w+)\.(\w+)\)", table)
    return {(f"commands/{name}.py", function) for name, function in found}


def _words(module: Module) -> Iterator[tuple[str, int]]:
    """Single words that are shown as such: headers, titles, names of rows, tasks and states."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.IfExp) and module.path.startswith("commands/"):
            for branch in (node.body, node.orelse):
                yield from _word(module, branch)
        in_commands = module.path.startswith("commands/")
        if in_commands and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "headers":
            for part in ast.walk(node.value):
                yield from _word(module, part)
        if (
            in_commands and isinstance(node, ast.Dict) and module.path not in NO_TABLES
        ):  # rows by name, or a record whose keys are shown in words
            keys = [key for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            yield from ((words(key.value), key.lineno) for key in keys if re.search("[a-z]{2}", key.value))
        if not isinstance(node, ast.Call):
            continue
        callee = ast.unparse(node.func).rsplit(".", 1)[-1]
        if callee in {"Table", "Text"} and module.path.startswith("commands/"):
            for part in ast.walk(node):
                yield from _word(module, part)
        elif callee in {"task", "facts", "grid", "report", "listing"} and node.args:
            for part in [
                node.args[0],
                *(getattr(node.args[0], "values", [])),
                getattr(node.args[0], "body", None),
                getattr(node.args[0], "orelse", None),
            ]:
                yield from _word(module, part)
        if callee == "task":
            unit = next(
                (k.value for k in node.keywords if k.arg == "unit"), node.args[2] if len(node.args) > 2 else None
            )
            if isinstance(unit, ast.Constant) and unit.value not in ("", "B"):
                yield f"{{1}} of {{2}} {unit.value}{'' if unit.value.endswith('s') else PLURAL}", node.lineno


def _word(module: Module, node: ast.AST | None) -> Iterator[tuple[str, int]]:
    """A constant of letters, unless it is a key or is compared."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w '%/,]*[a-z]{2}[\w '%/,]*", node.value):
        return
    parent = module.parents.get(node)
    asked = isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith(("get", "getattr"))
    if not asked and not isinstance(parent, ast.Subscript | ast.Compare | ast.JoinedStr):
        yield node.value, node.lineno
