"""Published backdoor attacks, re-created to measure the defence: one file each, and their names."""

from __future__ import annotations

from typing import Any

from benchmarks.defense.attacks.adaptive import Adaptive
from benchmarks.defense.attacks.badnets import AllToAll, BadNets
from benchmarks.defense.attacks.base import Attack
from benchmarks.defense.attacks.blended import Blended
from benchmarks.defense.attacks.bpp import Bpp
from benchmarks.defense.attacks.head import Head
from benchmarks.defense.attacks.input_aware import InputAware
from benchmarks.defense.attacks.label_consistent import LabelConsistent
from benchmarks.defense.attacks.lf import LowFrequency
from benchmarks.defense.attacks.sig import Sig
from benchmarks.defense.attacks.trojan import Trojan
from benchmarks.defense.attacks.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "badnets_all_to_all": AllToAll,
    "blended": Blended,
    "sig": Sig,
    "wanet": WaNet,
    "input_aware": InputAware,
    "lf": LowFrequency,
    "trojan": Trojan,
    "bpp": Bpp,
    "label_consistent": LabelConsistent,
    "adaptive": Adaptive,
    "head": Head,
}


def make(name: str, **parameters: Any) -> Attack:
    """The attack of this name, its defaults changed by `parameters`. SystemExit for an unknown name."""
    if name not in ATTACKS:
        raise SystemExit(f"there is no attack {name!r}; known: {', '.join(ATTACKS)}")
    return ATTACKS[name](**parameters)
