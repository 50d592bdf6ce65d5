"""The table of packages in docs/architecture.md is true: which of them imports which."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "archnet"
ANY = "any"  # in the table: may import all packages, or may be imported by all


def table() -> dict[str, tuple[set[str], set[str]]]:
    """For each package of the table, the packages of its row and those that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Packages")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| .* \| (.+?) \|$", section, flags=re.MULTILINE)
    found = {}
    for names, imports in rows:
        row = set(re.findall(r"`([\w.]+)`", names))
        allowed = {ANY} if imports == ANY else set(re.findall(r"`([\w.]+)`", imports))
        found |= dict.fromkeys(row, (row, allowed))
    return found


TABLE = table()
# The first row: packages that all others may import.
BASICS = next(iter(TABLE.values()))[0]


def entry(module: str) -> str:
    """The package of the table that a module belongs to; empty where there is none."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in TABLE), "")


def modules() -> list[str]:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
    named = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return list(dict.fromkeys(named))


def imports(module: str) -> Iterator[str]:
    """What a module imports of archnet, functions and type checking included."""
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "archnet":
            names = [f"archnet.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        # `import archnet` alone loads no package: its names are imported on first use.
        yield from (name.removeprefix("archnet.") for name in names if name[:8] == "archnet.")


@pytest.mark.parametrize("package", sorted({module.split(".")[0] for module in modules()}))
def test_packages_import_what_the_table_allows(package: str) -> None:
    assert package in TABLE, f"{package} has no row in the table of docs/architecture.md"
    for module in modules():
        if module.split(".")[0] != package:
            continue
        row, allowed = TABLE[entry(module)]
        for name in imports(module):
            found = entry(name)
            assert found, f"{module} imports {name}, which has no row in the table"
            fine = allowed == {ANY} or found in row | BASICS | allowed
            same = found.split(".")[0] == package
            assert fine or same, f"{module} imports {name}, which the table does not allow"


def test_the_table_names_packages() -> None:
    known = set(modules())
    for name, (_, allowed) in TABLE.items():
        assert name in known, f"the table names {name}, which there is not"
        assert allowed - {ANY} <= known, f"the row of {name} names {allowed - known}"


def test_there_is_no_circle() -> None:
    """Rows are in order: each imports only rows above it."""
    above: set[str] = set()
    for row, allowed in TABLE.values():
        assert allowed == {ANY} or allowed <= above | row, f"{row} imports a row below it"
        above |= row
