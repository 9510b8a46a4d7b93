"""Where settings come from: the command line and the TOML file, both turned into the same list of given options.

Only spelling and arity are judged here; values stay texts until `options` judges them. The command line follows EAL:
`--opt=val` or `--opt val`, an optional value only with `=`, the end at `--`. Short options also take `-m512`, as getopt
did for the EAL lines that people still paste.

Each `Given` remembers how it was written and where, so that every later error can name it in the user's own words.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dpdkmem.shared.errors import ConfigError
from dpdkmem.shared.option_table import BY_SPELLING, OPTIONS, Arity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from dpdkmem.shared.option_table import Option


@dataclass(frozen=True, slots=True)
class Given:
    """One occurrence of an option."""

    option: Option
    value: str | None
    """None for a flag, and for an optional value that was left out."""
    shown: str
    """As the user wrote it: "--socket-mem", or "socket-mem (/etc/dpdkmem.toml line 3)"."""

    @property
    def shown_with_value(self) -> str:
        """As `shown`, with the value: "--socket-mem=512", "-m 512", "socket-mem (/etc/dpdkmem.toml line 3) = 512"."""
        if self.value is None:
            return self.shown
        between = "=" if self.shown.startswith("--") else " " if self.shown.startswith("-") else " = "
        return f"{self.shown}{between}{self.value}"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A scanned command line."""

    given: tuple[Given, ...]
    rest: tuple[str, ...]
    """What stands after `--`: the application's own arguments."""


def scan_argv(argv: Sequence[str]) -> CommandLine:
    """Split a command line (without the program's name) into options.

    Raises:
        ConfigError: an unknown option, a missing or a superfluous value, or an argument that is no option.
    """
    given: list[Given] = []
    position = 0
    while position < len(argv):
        if argv[position] == "--":
            return CommandLine(tuple(given), tuple(argv[position + 1 :]))
        found, n_used = _scan_one(argv, position)
        given.append(found)
        position += n_used
    return CommandLine(tuple(given), ())


def _scan_one(argv: Sequence[str], position: int) -> tuple[Given, int]:
    spelling, value = _split(argv[position])
    option = _look_up(spelling, value)
    if option.arity is not Arity.VALUE or value is not None:
        return Given(option, value, spelling), 1
    if position + 1 == len(argv) or _looks_like_option(argv[position + 1]):
        raise ConfigError(f"{spelling} needs a value: {spelling} {option.metavar}")
    return Given(option, argv[position + 1], spelling), 2


def _split(argument: str) -> tuple[str, str | None]:
    if argument.startswith("--"):
        spelling, equals, value = argument.partition("=")
        return spelling, value if equals else None
    if argument.startswith("-") and len(argument) > 2:
        return argument[:2], argument[2:].removeprefix("=")
    return argument, None


def _look_up(spelling: str, value: str | None) -> Option:
    if not spelling.startswith("-") or spelling == "-":
        raise ConfigError(f"{spelling!r} is not an option. Arguments of the application follow after --")
    option = BY_SPELLING.get(spelling)
    if option is None:
        shown = spelling if spelling.startswith("--") else f"{spelling}{value or ''}"
        raise ConfigError(
            f"unknown option {shown}{_suggestions(shown, BY_SPELLING)}. --help lists all options"
        )
    if option.arity is Arity.FLAG and value is not None:
        raise ConfigError(f"{spelling} takes no value, but {value!r} was given")
    return option


def _looks_like_option(argument: str) -> bool:
    # EAL takes any next word as the value, so that a forgotten one swallows the option that follows it.
    return argument.startswith("--") or argument in BY_SPELLING


def _suggestions(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def scan_file(path: Path) -> tuple[Given, ...]:
    """Read a TOML file of options.

    A flag is a boolean (false: as if it were not there), a comma list may be an array, and an option that may be
    repeated is an array. Tables are not used.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown key or a value of the wrong kind; the text
            names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    given: list[Given] = []
    for key, value in settings.items():
        place = f"{path} line {_line_of(text, key)}"
        given += _from_file(key, value, place)
    return tuple(given)


def _line_of(text: str, key: str) -> int:
    # tomllib keeps no positions. The first line that begins with the key, quoted, dotted, or as a table, is the one.
    begins = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if begins.match(line)), 1)


def _from_file(key: str, value: object, place: str) -> list[Given]:
    option = BY_SPELLING.get(f"--{key}")
    if option is None or not option.in_file:
        raise ConfigError(f"{place}: unknown key {key!r}{_suggestions(key, _FILE_KEYS)}")
    shown = f"{key} ({place})"
    try:
        return [Given(option, text, shown) for text in _texts(option, value)]
    except TypeError as error:
        raise ConfigError(f"{place}: {key} = {value!r}: {error}") from None


def _texts(option: Option, value: object) -> list[str | None]:
    """Return the values as the command line would have them, one for each occurrence."""
    if isinstance(value, bool):
        return _flag_texts(option, value)
    if option.arity is Arity.FLAG:
        raise TypeError("a flag is true or false")
    if not isinstance(value, list):
        return [_text(option, value)]
    items = [_text(option, item) for item in value]
    if option.many:
        return list(items)
    if option.comma and items:
        return [",".join(items)]
    raise TypeError("one value is expected, not an array" if items else "the array is empty")


def _flag_texts(option: Option, value: bool) -> list[str | None]:
    if option.arity is Arity.VALUE:
        raise TypeError(f"a value is expected: {option.metavar}")
    return [None] if value else []


def _text(option: Option, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if option.hexadecimal else str(value)
    raise TypeError(f"{value!r} is neither a string nor an integer")


_FILE_KEYS: Final = tuple(
    spelling.removeprefix("--")
    for option in OPTIONS
    if option.in_file
    for spelling in option.spellings
    if spelling.startswith("--")
)
