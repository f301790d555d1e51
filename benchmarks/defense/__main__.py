"""Train backdoored networks, repair them with each defence, and draw tables of what came out.

python -m benchmarks.defense train --data FILE --attacks badnets sig --networks narrow18 --out DIR
python -m benchmarks.defense run --models DIR --data NAME=FILE --json ROWS
python -m benchmarks.defense table ROWS --write
"""

from __future__ import annotations

import argparse

from benchmarks.defense import run, table, train

COMMANDS = (train, run, table)


def main() -> None:
    """Run the command that is named first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args()
    args.main(args)


if __name__ == "__main__":
    main()
