"""Problems in EvalPlus's form, written for the tests: small, with an edge that only the extra tests find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HUMANEVAL: list[dict[str, Any]] = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def largest(numbers):\n    """Return the largest of numbers, None where there are none."""\n',
        "entry_point": "largest",
        "canonical_solution": "    return max(numbers) if numbers else None\n",
        "contract": "",
        "base_input": [[[1, 3, 2]], [[5]]],
        "plus_input": [[[]], [[-1, -2]]],
        "atol": 0,
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'def half(value: float) -> float:\n    """Return half of value.\n\n    >>> half(3)\n    1.5\n    """\n',  # noqa: E501
        "entry_point": "half",
        "canonical_solution": "    return value / 2\n",
        "contract": "",
        "base_input": [[2], [4]],
        "plus_input": [[3], [0.1]],
        "atol": 0,
    },
    {
        "task_id": "HumanEval/2",
        "prompt": (
            'def shout(text):\n    """Return text in capitals."""\n    return text.upper()\n\n\n'
            'def shout_twice(text):\n    """Return text in capitals, twice, with a space between the two."""\n'
        ),
        "entry_point": "shout_twice",
        "canonical_solution": "    return shout(text) + ' ' + shout(text)\n",
        "contract": "",
        "base_input": [["a"]],
        "plus_input": [[""]],
        "atol": 0,
    },
]  # fmt: skip

MBPP: list[dict[str, Any]] = [
    {
        # EvalPlus turns this one's lists into tuples, and compares the answer as a set
        "task_id": "Mbpp/2",
        "prompt": '"""\nFind what two tuples share.\nassert set(similar_elements((1, 2), (2, 3))) == {2}\n"""\n',
        "entry_point": "similar_elements",
        "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        "contract": "",
        "base_input": [[[1, 2], [2, 3]], [[1], [1]]],
        "plus_input": [[[], []], [[1, 2, 3], [3, 2]]],
        "atol": 0,
    },
    {
        "task_id": "Mbpp/3",
        "prompt": '"""\nWrite a function to count the words of a text.\nassert count_words("a b") == 2\n"""\n',
        "entry_point": "count_words",
        "canonical_solution": "\ndef count_words(text):\n    return len(text.split())\n",
        "contract": "",
        "base_input": [["a b"], ["a"]],
        "plus_input": {},
        "atol": 0,
    },
]  # fmt: skip


def write_problems(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file as EvalPlus publishes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
