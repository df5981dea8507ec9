"""Schemas are the contract with every caller and every saved graph: a change is made on purpose, or not at all.

python tests/test_schemas.py --update    # writes schemas.txt from the registry
"""

import difflib
import sys
from pathlib import Path

from deepseek_kernels.ops._registry import OPERATORS

GOLDEN = Path(__file__).with_name("schemas.txt")


def schemas() -> str:
    return "".join(f"{line}\n" for line in sorted(str(op.overload._schema) for op in OPERATORS.values()))


def test_schemas_are_the_recorded_ones():
    difference = difflib.unified_diff(GOLDEN.read_text().splitlines(), schemas().splitlines(), "recorded", "registered")
    message = "\n".join(difference)
    assert not message, f"{message}\nIf this is meant: python tests/test_schemas.py --update"


def test_no_keyword_only_arguments():
    for op in OPERATORS.values():
        assert not any(a.kwarg_only for a in op.overload._schema.arguments), op.schema


def test_overloads_that_write_return_nothing():
    for op in OPERATORS.values():
        schema = op.overload._schema
        assert schema.is_mutable == any(a.is_write for a in schema.arguments)
        if schema.is_mutable:
            assert not schema.returns, f"{op.schema}: a variant that writes into an argument returns nothing"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    GOLDEN.write_text(schemas())
