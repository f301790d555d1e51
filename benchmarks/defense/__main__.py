"""Train backdoored networks, for measuring the defence on them.

python -m benchmarks.defense train --data FILE --attacks badnets sig --networks narrow18 --out DIR
"""

from __future__ import annotations

import argparse

from benchmarks.defense import train

COMMANDS = (train,)


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
