"""Published backdoor attacks, re-created to measure the defence: one file each, and their names."""

from __future__ import annotations

from typing import Any

from benchmarks.defense.attacks.badnets import AllToAll, BadNets
from benchmarks.defense.attacks.base import Attack

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "badnets_all_to_all": AllToAll,
}


def make(name: str, **parameters: Any) -> Attack:
    """The attack of this name, its defaults changed by `parameters`. SystemExit for an unknown name."""
    if name not in ATTACKS:
        raise SystemExit(f"there is no attack {name!r}; known: {', '.join(ATTACKS)}")
    return ATTACKS[name](**parameters)
