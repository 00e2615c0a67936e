"""Plain English: rules 1, 2, 4 and 6 of the house style, counted in every text that a reader meets.

Collected texts:

- docstrings and comments of Python files
- messages of the package, that is errors and log lines
- comments of Lua, shell, C and configuration files
- prose of the documentation.

Names in backquotes and code blocks are left out.

``python -m tests.project.test_prose`` prints a table of counts per file and word.  ``--lines`` prints each finding.
Further arguments are files or folders.  ``--rule NAME`` limits the output to one rule.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]

#: Folders and files of the project that hold prose, relative to its root.
PLACES = (
    *("pybreaker_redis", "tests", "benchmarks", "examples", "docs"),
    *("README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst", "SECURITY.rst"),
    *(".ci/run", "tox.ini", "pyproject.toml", "setup.cfg", "mutation.toml"),
)

#: Findings that are still allowed, by folder.  A number only becomes smaller, and a folder at zero leaves the table.
ALLOWED: dict[str, int] = {}

#: Most words of a sentence: rule 6.
MAX_WORDS = 25

Kind = Literal["docstring", "comment", "message", "page", "title"]

#: Rule 4, by the word under which a finding is counted.
WORDS: dict[str, re.Pattern[str]] = {
    word: re.compile(pattern, re.IGNORECASE)
    for word, pattern in {
        "whoever": r"\bwho(ever|soever|mever)\b",
        "somebody": r"\bsomebody\b",
        "anybody": r"\banybody\b",
        "nobody": r"\bnobody\b",
        "one's own": r"\bone's own\b",
        "let go": r"\blet(s|ting)? go\b",
        "is the matter": r"\b(is|was|be) the matter\b",
        "at it": r"\bat it\b",
        "besides": r"\bbesides\b",
        "by now": r"\bby now\b",
        "be it": r"\bbe it\b",
        "shall": r"\bshall\b",
        "anew": r"\banew\b",
        "goes by": r"\b(go|goes|going|gone|went) by\b",
        "whereabouts": r"\bwhereabouts\b",
        "else": r"\belse\b",
        "who": r"\bwho(m|se)?\b",
    }.items()
}

#: Nouns of people.  Such a noun among the `NEAR` words before a relative pronoun makes the pronoun right.
PEOPLE = re.compile(
    r"(administrator|author|colleague|developer|engineer|maintainer|newcomer|operator|people|person|reader|reviewer|user)s?$",
    re.IGNORECASE,
)

#: Most words from a noun of people to its relative pronoun.
NEAR = 4

PRONOUN = re.compile(r"(it|that|this|they)\b", re.IGNORECASE)

#: First lines that state what a module ignores instead of what the module is.
SLOGAN = re.compile(r"^(Knows|Does not know):|\bDoes not know:", re.MULTILINE)

#: Comments that tools read.
FOR_TOOLS = re.compile(r"^(noqa|type:|pragma|fmt:|ruff:|mypy:|!|-\*-|pylint|isort)|^-- .* -+$|^[-=# ]*$")

SECTION = re.compile(
    r"^(Args|Attributes|Returns|Raises|Yields|Examples?|Note|Notes|Usage|KEYS|ARGV|TIME|WRITES|RETURNS):$"
)

#: What begins a paragraph of its own: an entry of a section, an item of a list.
ENTRY = re.compile(r"^\s*(\*{0,2}[\w.]+(?: \([^)]*\))?:\s|[-*]\s|\d+\.\s|\w+\[\d+\]\s)")

#: What stands under a title of a page.
PAGE_RULE = re.compile(r"([=\-~^\"'*+#`.])\1{2,}")

#: A line of a table of reStructuredText, and what separates two of its cells.
TABLE_RULE = re.compile(r"=+(?: +=+)+|={3,}")
CELLS = re.compile(r" {2,}(?=\S)")

#: Stands between two cells, and before the first.
CELL = "\x1f"

#: A full stop that ends a sentence, and not an abbreviation.
END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z`\d])")


@dataclass(frozen=True)
class Text:
    """One piece of prose.

    Attributes:
        path: File in which the text stands.
        line: Line of the file on which the text begins.
        kind: What the text is.
        text: The words, with their line breaks.
    """

    path: Path
    line: int
    kind: Kind
    text: str


@dataclass(frozen=True)
class Finding:
    """One violation.

    Attributes:
        text: Where.
        rule: One of ``word``, ``question``, ``pronoun``, ``slogan``, ``bare exception``, ``long sentence``,
            ``semicolon``.
        word: What was found.
        line: Line of the file.
        excerpt: Some words around.
    """

    text: Text
    rule: str
    word: str
    line: int
    excerpt: str

    def __str__(self) -> str:
        return f"{self.text.path.relative_to(ROOT)}:{self.line}: {self.rule}: {self.word}: {self.excerpt}"


# -- collection --------------------------------------------------------------------------------------------------------


def files(places: Iterable[str | Path]) -> Iterator[Path]:
    """Yield every file with prose in some places, in a stable order."""
    for place in places:
        path = ROOT / place
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if file.suffix in (".py", ".lua", ".c", ".rst", ".md")
                and not any(part.startswith((".", "_build")) for part in file.relative_to(ROOT).parts)
            )


@functools.cache
def texts(path: Path) -> tuple[Text, ...]:
    """Return every text of a file."""
    return tuple(_texts(path))


def _texts(path: Path) -> Iterator[Text]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(source)
        yield from _docstrings(path, tree)
        yield from _comments(path, source)
        if ROOT / "pybreaker_redis" in path.parents:
            yield from _messages(path, tree)
    elif path.suffix in (".rst", ".md"):
        yield from _pages(path, source)
    else:
        marker = {".lua": r"--+", ".c": r"//|/?\*+/?"}.get(path.suffix, r"#+")
        lines = [(number, line.strip()) for number, line in enumerate(source.splitlines(), 1)]
        found = [
            (number, 0, "", match[1]) for number, line in lines if (match := re.match(rf"(?:{marker})\s?(.*)", line))
        ]
        yield from _blocks(path, found)


def _docstrings(path: Path, tree: ast.Module) -> Iterator[Text]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Text(path, node.body[0].lineno, "docstring", with_cells(docstring))


def _comments(path: Path, source: str) -> Iterator[Text]:
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said = re.sub(r"^#+:?\s?", "", token.string)
            before = token.line[: token.start[1]].strip()
            found.append((token.start[0], token.start[1], before, said))
    yield from _blocks(path, found)


def _blocks(path: Path, found: list[tuple[int, int, str, str]]) -> Iterator[Text]:
    """Yield comments.  Those of consecutive lines with one indentation are one text."""
    block: list[tuple[int, int, str, str]] = []
    for item in [*found, (-1, -1, "", "")]:
        goes_on = block and item[0] == block[-1][0] + 1 and item[1] == block[-1][1] and not item[2] and not block[-1][2]
        if not goes_on:
            said = [line for _, _, _, line in block]
            if said and not FOR_TOOLS.match(said[0]):
                # What tools read may follow what people read.
                yield Text(
                    path, block[0][0], "comment", "\n".join(re.sub(r"\s*#\s*(noqa|type:).*", "", one) for one in said)
                )
            block = []
        if item[0] > 0:
            block.append(item)


def _messages(path: Path, tree: ast.Module) -> Iterator[Text]:
    """Yield string literals with at least three words: errors, log lines, output of commands."""
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in ast.walk(node) if part is not node)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            said = "".join(str(part.value) if isinstance(part, ast.Constant) else "``" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value
        else:
            continue
        if (
            len(re.findall(r"[A-Za-z]{2,}", said)) >= 3
            and " " in said.strip()
            and not re.search(r"\n(import|local) ", said)
        ):
            yield Text(path, node.lineno, "message", said)


def _pages(path: Path, source: str) -> Iterator[Text]:
    """Yield paragraphs and titles of a page of reStructuredText, without code, directives and rules of tables."""
    lines = with_cells(source).splitlines()
    block: list[str] = []
    begin, skipping = 0, -1
    for number, line in enumerate([*lines, ""], 1):
        indent = len(line) - len(line.lstrip())
        if skipping >= 0:
            if not line.strip() or indent > skipping:
                continue
            skipping = -1
        stripped = line.strip()
        is_rule = bool(PAGE_RULE.fullmatch(stripped))
        is_title = is_rule and len(block) == 1
        ends = not stripped or is_rule or stripped.startswith("..")
        if block and (ends or ENTRY.match(line) or line.startswith(CELL)):
            yield Text(path, begin, "title" if is_title else "page", "\n".join(block))
            block = []
        if ends:
            # A directive's options are among its content.
            skipping = indent if re.match(r"\.\.( |$)", stripped) else -1
            continue
        if not block:
            begin = number
        block.append(stripped)
        if stripped.endswith("::"):
            yield Text(path, begin, "page", "\n".join(block))
            block, skipping = [], indent


def with_cells(text: str) -> str:
    """Return the text with `CELL` before each cell of a table, so that no sentence continues into another cell."""
    lines, in_table = [], False
    source = text.splitlines()
    for number, line in enumerate(source):
        if TABLE_RULE.fullmatch(line.strip()):
            follows = source[number + 1].strip() if number + 1 < len(source) else ""
            is_title = number > 0 and not in_table and source[number - 1].strip() and " " not in line.strip()
            in_table = bool(follows) and not is_title
            lines.append(line if is_title else "")
        elif in_table and line.strip():
            lines.append(CELL + CELLS.sub(CELL, line.strip()))
        else:
            lines.append(line)
    return "\n".join(lines)


# -- rules -------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return the text with a placeholder for each name in backquotes or code in a doctest.  Line breaks stay."""
    text = re.sub(r"^\s*(>>>|\.\.\.) .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"(`+)(?:[^`]|\n)*?\1_?", lambda match: "X" + "\n" * match[0].count("\n"), text)


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text, line by line of lists and entries."""
    paragraph: list[str] = []
    lines = ["" if SECTION.match(line.strip()) else line for line in text.replace(CELL, "\n\n").splitlines()]
    for line in [*lines, ""]:
        if not line.strip() or (paragraph and ENTRY.match(line)):
            yield from END.split(" ".join(paragraph)) if paragraph else ()
            paragraph = []
        if line.strip():
            paragraph.append(ENTRY.sub("", line).strip() if ENTRY.match(line) else line.strip())


def check(text: Text) -> Iterator[Finding]:
    """Yield every violation in a text."""
    body = plain(text.text)
    for rule, word, at in (*_words(body), *_openings(text.kind, body), *_lengths(text.kind, body)):
        excerpt = " ".join(body[max(0, at - 20) : at + 60].split())
        yield Finding(text, rule, word, text.line + body.count("\n", 0, at), excerpt)


#: Rule, word, and place in the text.
Found = tuple[str, str, int]


def _words(body: str) -> Iterator[Found]:
    for word, pattern in WORDS.items():
        for match in pattern.finditer(body):
            before = re.findall(r"[\w']+", body[: match.start()])[-NEAR:]
            if word != "who" or not any(PEOPLE.match(one) for one in before):
                yield "word", word, match.start()


def _openings(kind: Kind, body: str) -> Iterator[Found]:
    first = re.split(r"\n\s*\n|(?<=[.?!])\s", body.strip(), maxsplit=1)[0]
    if kind in ("docstring", "title") and first.rstrip().endswith("?"):
        yield "question", "?", 0
    if kind in ("docstring", "comment") and (opening := PRONOUN.match(body.strip())):
        yield "pronoun", opening[0].lower(), 0
    if kind == "docstring":
        yield from (("slogan", "Knows", match.start()) for match in SLOGAN.finditer(body))
        bare = re.finditer(r"Raises:\n\s+(Base)?Exception\b", body)
        yield from (("bare exception", "Exception", match.start()) for match in bare)


def _lengths(kind: Kind, body: str) -> Iterator[Found]:
    if kind in ("message", "title"):
        # The form of a log line has a semicolon of its own.
        return
    for sentence in sentences(body):
        if len(re.findall(r"[A-Za-z0-9][\w'./-]*", sentence)) > MAX_WORDS:
            yield "long sentence", "more than 25 words", max(0, body.find(sentence.split(maxsplit=1)[0]))
        for match in re.finditer(r";(?= |$)", sentence):
            yield "semicolon", ";", max(0, body.find(sentence[max(0, match.start() - 20) : match.end()]))


def findings(places: Iterable[str | Path] = PLACES) -> list[Finding]:
    """Return every violation in some places."""
    return [found for path in files(places) for text in texts(path) for found in check(text)]


# -- tests -------------------------------------------------------------------------------------------------------------

#: For each rule and word, a text that breaks the rule, and one that does not.
EXAMPLES: tuple[tuple[str, str, Kind, str, str], ...] = (
    ("word", "whoever", "comment", "Whoever asks waits.", "The caller waits."),
    ("word", "somebody", "comment", "Changed by somebody.", "Changed by another process."),
    ("word", "anybody", "comment", "Before anybody waits.", "Before a caller waits."),
    ("word", "nobody", "message", "nobody listens to ``", "no process listens to ``"),
    ("word", "one's own", "comment", "A server of one's own.", "A private server."),
    ("word", "let go", "comment", "Letting go of a circuit.", "Release a circuit."),
    ("word", "is the matter", "comment", "What is the matter.", "The cause."),
    ("word", "at it", "comment", "While at it, close.", "Look at its name."),
    ("word", "besides", "comment", "May import, besides.", "May also import, beside the call."),
    ("word", "by now", "comment", "Gone by now.", "Known by nowhere."),
    ("word", "be it", "comment", "Each, be it open.", "It may be its own."),
    ("word", "shall", "comment", "It shall wait.", "A shallow copy."),
    ("word", "anew", "comment", "Made anew.", "Made again."),
    ("word", "goes by", "message", "went by its own", "used its local circuit"),
    ("word", "whereabouts", "page", "The whereabouts.", "The location."),
    ("word", "else", "comment", "Else the call waits.", "Otherwise the call waits, see `else`."),
    ("word", "who", "comment", "A process who waits.", "An operator of many servers who waits."),
    ("word", "who", "comment", "A process whose thread waits.", "A user whose process waits."),
    ("question", "?", "docstring", "What may a call do?\n\nMore.", "Rules of a call.\n\nWhy not?"),
    ("question", "?", "title", "Who may call?", "Callers"),
    ("pronoun", "it", "comment", "It waits.", "Items wait."),
    ("pronoun", "this", "docstring", "This waits.", "Wait. This is slow."),
    (
        "slogan",
        "Knows",
        "docstring",
        "A view.\n\nKnows: time.  Does not know: Redis.",
        "A view.\n\nThe view knows: time.",
    ),
    (
        "bare exception",
        "Exception",
        "docstring",
        "Do.\n\nRaises:\n    Exception: No.",
        "Do.\n\nRaises:\n    ValueError: No.",
    ),
    ("long sentence", "more than 25 words", "comment", "word " * 26 + ".", "word " * 25 + ". " + "Word " * 25 + "."),
    ("semicolon", ";", "docstring", "Wait; then go.", "Wait. Then go `a; b`."),
)


def found_in(kind: Kind, text: str) -> set[tuple[str, str]]:
    """Return the rules that a text breaks, with the words."""
    return {(found.rule, found.word) for found in check(Text(ROOT / "example", 1, kind, text))}


def test_each_rule_finds_its_example_and_no_other() -> None:
    """A rule that finds nothing would be a test that cannot fail."""
    for rule, word, kind, bad, good in EXAMPLES:
        assert (rule, word) in found_in(kind, bad), bad
        assert (rule, word) not in found_in(kind, good), good
    assert set(WORDS) == {word for rule, word, *_ in EXAMPLES if rule == "word"}


def test_tables_are_no_sentences() -> None:
    """Each cell of a table stands alone."""
    table = "====  ====\n" + "one two three four  five six seven\n" * 9 + "====  ====\n"
    assert list(sentences(with_cells(table))) == ["one two three four", "five six seven"] * 9


def test_every_kind_of_text_is_collected() -> None:
    """A file format that the collection cannot read would hide its findings."""
    kinds = {(path.suffix, text.kind) for path in files(PLACES) for text in texts(path)}
    assert kinds >= {
        *((".py", "docstring"), (".py", "comment"), (".py", "message")),
        *((".lua", "comment"), (".rst", "page"), (".rst", "title"), (".ini", "comment"), (".toml", "comment")),
    }


def test_prose_keeps_the_house_style() -> None:
    """No folder has more findings than `ALLOWED` permits.  The goal is an empty `ALLOWED`."""
    by_folder: dict[str, list[Finding]] = {}
    for found in findings():
        by_folder.setdefault(str(found.text.path.relative_to(ROOT).parent), []).append(found)
    over = {folder: found for folder, found in by_folder.items() if len(found) > ALLOWED.get(folder, 0)}
    assert not over, "\n".join(
        f"{folder}: {len(found)} findings, {ALLOWED.get(folder, 0)} allowed\n" + "\n".join(map(str, found))
        for folder, found in over.items()
    )


# -- by hand -----------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Print findings or counts, and return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.project.test_prose")
    parser.add_argument("places", nargs="*", default=PLACES)
    parser.add_argument("--lines", action="store_true", help="print each finding")
    parser.add_argument("--rule", help="only this rule")
    chosen = parser.parse_args(arguments)
    found = [one for one in findings(chosen.places) if chosen.rule in (None, one.rule)]
    if chosen.lines:
        print(*found, sep="\n")
    rules = Counter(one.rule for one in found)
    print("\nper rule:", dict(rules.most_common()))
    print("per word:", dict(Counter(one.word for one in found if one.rule == "word").most_common()))
    per_file: dict[Path, Counter[str]] = {}
    for one in found:
        per_file.setdefault(one.text.path.relative_to(ROOT), Counter())[one.rule] += 1
    columns = list(rules)
    print("file | " + " | ".join(columns))
    for path, counts in sorted(per_file.items(), key=lambda item: -item[1].total()):
        print(f"{path} | " + " | ".join(str(counts[rule]) for rule in columns))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
