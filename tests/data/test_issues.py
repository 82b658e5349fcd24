"""The table of issue types in the documentation."""

import re
from pathlib import Path

from deformable_detr.data.issues import ISSUE_TYPES

ROOT = Path(__file__).parents[2]


def test_documentation_lists_all_issue_types():
    text = (ROOT / "docs/check.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ((?:error|warning|note) .*) \|$", text, re.MULTILINE))
    assert rows == {
        code: f"{issue_type.severity} | {issue_type.meaning} | {issue_type.hint}"
        for code, issue_type in ISSUE_TYPES.items()
    }
