"""Train clean and backdoored networks and save them as cases."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""


def main(args: argparse.Namespace) -> None:
    """Train what is not there yet."""
    raise NotImplementedError
