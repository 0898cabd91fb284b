"""What the documents tell a reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(path: str, language: str) -> list[str]:
    """The code blocks of one language in a Markdown file."""
    text = (ROOT / path).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(path: str) -> list[list[str]]:
    """The calls of ``repr-det`` in a Markdown file, each without that word."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == ["repr-det"]]
