"""Options that take several names at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def several(names: Collection[str], what: str) -> Callable[[str], list[str]]:
    """A `type` of argparse: names with commas between them, each one of `names`.

    Args:
        names: that there are.
        what: one of them is called in the message.
    """

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(names):
            missing = ", ".join(sorted(unknown))
            raise argparse.ArgumentTypeError(f"no {what} {missing}; there are {list(names)}")
        return found

    return parse
