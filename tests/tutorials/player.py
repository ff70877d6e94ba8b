"""Play a page: python player.py PAGE [LANGUAGE], in the folder where its reader would be.

With a language, only its blocks are played.

Blocks are run in their order. ``python`` blocks share one interpreter, as in a session; ``bash``
blocks run in a shell; a block with a name behind its language is a file of that name. A ``text``
block is what the block before it prints: ``...`` stands for anything, and spaces and the lines of
tables make no difference. Comments before a block change what is played, never what is read:

- ``<!-- ci: OLD => NEW -->`` replaces text, mostly a size by a smaller one;
- ``<!-- ci: exit 1 -->`` is the exit code that a shell block should have;
- ``<!-- ci: skip, WHY -->`` leaves a block out, and ``<!-- ci: not compared, WHY -->`` an output.
"""

import contextlib
import io
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(
    r"(?P<comments>(?:^<!-- ci: [^\n]* -->\n)*)^```(?P<language>\w+)(?: (?P<name>\S+))?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"^<!-- ci: (.*) -->$", re.MULTILINE)
_FRAME = re.compile(r"[\u2500-\u257f|]+")


class PageError(AssertionError):
    """A block failed, or printed something else than the page shows."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page and what the comments before it say."""

    line: int
    language: str
    name: str
    text: str
    exit_code: int
    left_out: str


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, replacements made.

    Raises
    ------
    PageError
        A comment is none of those above, or replaces what is not there.
    """
    return [
        _block(found, page.count("\n", 0, found.start()) + 1) for found in _FENCE.finditer(page)
    ]


def _block(found: re.Match[str], line: int) -> Block:
    text, code, left_out = found["text"], 0, ""
    for comment in _COMMENT.findall(found["comments"]):
        if " => " in comment:
            old, new = comment.split(" => ")
            if old not in text:
                raise PageError(f"line {line}: the block has no {old!r} to replace")
            text = text.replace(old, new)
        elif kind := re.fullmatch(r"exit (\d+)", comment):
            code = int(kind[1])
        elif re.match(r"(skip|not compared), \w", comment):
            left_out = comment
        else:
            raise PageError(f"line {line}: unknown comment {comment!r}")
    return Block(line, found["language"], found["name"] or "", text, code, left_out)


def play(page: str, language: str = "") -> int:
    """Run a page, or its blocks of one language; return how many ran or were compared.

    Raises
    ------
    PageError
        As soon as something is not as the page says.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, played = "", 0
    for block in blocks_of(page):
        if block.left_out or language not in ("", block.language):
            continue
        played += 1
        if block.name:
            path = Path(block.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = _in_session(block, names)
        elif block.language == "bash":
            printed = _in_shell(block)
        elif block.language == "text":
            _compare(block, printed)
        else:
            raise PageError(f"line {block.line}: nothing is known of {block.language!r} blocks")
    return played


def _in_session(block: Block, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # The lines of a traceback should be those of the page.
        code = compile("\n" * block.line + block.text, "page", "exec")
        exec(code, names)
    return out.getvalue()


def _in_shell(block: Block) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != block.exit_code:
        raise PageError(
            f"line {block.line}: exit code {done.returncode}, not {block.exit_code}:\n"
            f"{block.text}{done.stdout[-3000:]}"
        )
    return done.stdout


def _compare(block: Block, printed: str) -> None:
    wanted, got = (" ".join(_FRAME.sub(" ", text).split()) for text in (block.text, printed))
    pattern = ".*?".join(re.escape(part.strip()) for part in wanted.split("..."))
    if re.fullmatch(pattern.replace(".*?", r"\s*.*?\s*"), got) is None:
        raise PageError(f"line {block.line}: the page shows\n{wanted}\nbut this was printed\n{got}")


if __name__ == "__main__":
    print(f"{play(Path(sys.argv[1]).read_text(encoding='utf-8'), *sys.argv[2:])} blocks")
