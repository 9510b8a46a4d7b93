"""What of a text may reach logs, terminals and fields of messages.

`is_text` is the rule for names, as native/text.c has it; `printable` makes something fit to be shown of words that know no rules.
"""

from __future__ import annotations


def is_text(text: str) -> bool:
    """Tell whether a text may reach a terminal: no C0, DEL or C1; all else is its author's taste."""
    return not any(character < " " or "\x7f" <= character <= "\x9f" for character in text)


def printable(text: str, most_bytes: int) -> bytes:
    """Return a text as UTF-8 of at most so many bytes, with a space for what cannot be printed: it is cut, never refused."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown.encode()[:most_bytes].decode(errors="ignore").encode()
