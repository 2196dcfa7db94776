"""The command lines of tests/bench."""

from __future__ import annotations

import argparse


def make_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with `text`, with its line breaks."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
