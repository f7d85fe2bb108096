"""Find banned phrases in comments, strings and docs, and print what to write instead.

    python tools/check_wording.py [PATH ...]

The script checks the comments and strings of Python files, and the whole text of Markdown files.
The phrases and their replacements are in `[tool.wording]` of pyproject.toml.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["wording"]
PROSE = {tokenize.COMMENT, tokenize.STRING} | {
    number for number, name in tokenize.tok_name.items() if name.startswith("FSTRING")
}


def read_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each comment, string or Markdown line of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in PROSE:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def find_phrases(path: Path) -> Iterator[str]:
    """Yield a message for each banned phrase in a file."""
    for phrase, replacement in SETTINGS["banned"].items():
        pattern = re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE)
        for line, text in read_prose(path):
            if found := pattern.search(text):
                yield f"{path}:{line}: {found.group()!r}: write {replacement}"


def main() -> int:
    command = ["git", "ls-files", "--", *(sys.argv[1:] or SETTINGS["paths"])]
    done = subprocess.run(  # noqa: S603  # git, with paths from the command line
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = (Path(name) for name in done.stdout.splitlines() if name.endswith((".py", ".md")))
    messages = [message for path in paths for message in find_phrases(path)]
    print("\n".join(messages) or "no banned phrases")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
