"""Count the attention processors of the installed diffusers: gone, changed, new since the table.

python tools/processors.py            what differs from the table
python tools/processors.py --write    write the table, tests/support/processors.json

A processor is a class whose `__call__` makes an attention call. The table has the version, and of
each class the calls, whether it passes a mask of FlexAttention, and a hash of its code.
"""

import ast
import hashlib
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

TABLE = Path(__file__).parents[1] / "tests" / "support" / "processors.json"
CALLS = ("dispatch_attention_fn", "scaled_dot_product_attention")
MASKS = ("BlockMask", "FLEX", "flex")  # names and words by which FlexAttention is asked for


class Row(TypedDict):
    """One processor."""

    calls: list[str]
    flex: bool
    code: str


class Table(TypedDict):
    """Processors of one version of diffusers, by "file:class"."""

    diffusers: str
    processors: dict[str, Row]


def installed() -> Table:
    """Read the sources of the installed diffusers, without importing them."""
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    found: dict[str, Row] = {}
    for path in sorted(models.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if any(name in text for name in CALLS):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and (row := _row(node)):
                    found[f"{path.relative_to(models).as_posix()}:{node.name}"] = row
    return {"diffusers": version("diffusers"), "processors": found}


def _row(kind: ast.ClassDef) -> Row | None:
    functions = (x for x in kind.body if isinstance(x, ast.FunctionDef) and x.name == "__call__")
    function = next(functions, None)
    if function is None:
        return None
    names = {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}
    names |= {x.attr for x in ast.walk(function) if isinstance(x, ast.Attribute)}
    calls = [name for name in CALLS if name in names]
    if not calls:
        return None
    inside = {x.id for x in ast.walk(kind) if isinstance(x, ast.Name)}
    inside |= {x.attr for x in ast.walk(kind) if isinstance(x, ast.Attribute)}
    inside |= {str(x.value) for x in ast.walk(kind) if isinstance(x, ast.Constant)}
    # Kandinsky 5's mask is made by a function of its module.
    flex = not inside.isdisjoint(MASKS) or any("nabla" in name.lower() for name in names)
    code = hashlib.sha256(ast.dump(function).encode()).hexdigest()[:16]
    return {"calls": calls, "flex": flex, "code": code}


def known() -> Table:
    """Read the table."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def compared(old: Table, new: Table) -> dict[str, list[str]]:
    """List the processors that are gone, make another attention call, have other code, and are
    new."""
    before, after = old["processors"], new["processors"]
    both = before.keys() & after.keys()
    moved = [name for name in both if before[name]["calls"] != after[name]["calls"]]
    return {
        "gone": sorted(before.keys() - after.keys()),
        "another call": sorted(moved),
        "other code": sorted(
            name for name in both - {*moved} if before[name]["code"] != after[name]["code"]
        ),
        "new": sorted(after.keys() - before.keys()),
    }


def told(old: Table, new: Table) -> str:
    """Say what differs, a line for each kind and each processor."""
    counts = (
        f"diffusers {table['diffusers']} has {len(table['processors'])}" for table in (old, new)
    )
    lines = [f"processors: {', '.join(counts)}"]
    for kind, names in compared(old, new).items():
        lines += [f"{kind}: {len(names)}", *(f"  {name}" for name in names)]
    return "\n".join(lines)


if __name__ == "__main__":
    now = installed()
    if "--write" in sys.argv[1:]:
        TABLE.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        print(told(known(), now))
