"""Evidence and verdict on logits made by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mnp_fast import PruneConfig
from mnp_fast.detect import (
    EVIDENCE,
    NONE_FOUND,
    SUSPICIOUS,
    Evidence,
    Look,
    commonest,
    repair_classes,
    repair_strength,
    undecided,
    verdict,
    weigh,
)
from mnp_fast.waves import Wave


def answers(counts: list[int]) -> Tensor:
    """Logits of a model that puts counts[c] pictures into class c, in mixed order."""
    predicted = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    predicted = predicted[torch.randperm(len(predicted), generator=torch.Generator().manual_seed(0))]
    return 5.0 * torch.nn.functional.one_hot(predicted, len(counts)).float()


def look(share: float, target: int = 3, batch_norms: bool = True, transferred: float = 0.1, wave: float = 0.0) -> Look:
    return Look(
        pictures=500,
        classes=10,
        collapse_share=0.3,
        second_share=0.0,
        suppressed_loss=2.0,
        searched_class=target,
        searched_share=0.5,
        pulled_class=target,
        perturbed_share=share,
        transferred_class=7,
        transferred_share=transferred,
        transferred_second=0.1,
        wave_class=5,
        wave_contrast=wave,
        batch_norms=batch_norms,
    )


def evidence(*args: Any, **kwargs: Any) -> Evidence:
    return Evidence((look(*args, **kwargs),))


def of_many(found: Look) -> Evidence:
    return Evidence((replace(found, pictures=500),))


def changed(found: Evidence, **fields: Any) -> Evidence:
    return Evidence(tuple(replace(one, **fields) for one in found.looks))


@pytest.mark.parametrize(
    ("counts", "top", "second"), [([1, 2, 6, 1], 2, 0.2), ([0, 10, 0], 1, 0.0), ([3, 7], 1, 0.3), ([8, 1, 1], 0, 0.1)]
)
def test_weigh(counts: list[int], top: int, second: float) -> None:
    logits = answers(counts)
    labels = torch.arange(10) % len(counts)
    assert commonest(logits, 1)[0] == top
    pulled = len(counts) - 1
    found = weigh(logits, labels, {pulled: answers([1] * pulled + [5])}, 0.5, {0: 0.0}, None, True)
    assert found.pulled_class == found.searched_class == pulled
    assert found.perturbed_share == pytest.approx(5 / (len(counts) + 4))
    assert found.collapse_share == pytest.approx(counts[top] / 10)
    assert found.second_share == pytest.approx(second)
    right = int((logits.argmax(1) == labels).sum())
    normalizer = math.log(math.exp(5) + len(counts) - 1)
    assert found.suppressed_loss == pytest.approx(normalizer - 5 * right / 10, rel=1e-5)


def test_of_two_classes_the_one_that_is_pulled_into_better() -> None:
    logits, labels = answers([3, 4, 3]), torch.arange(10) % 3
    shares = {2: answers([2, 2, 6]), 1: answers([1, 7, 2])}
    found = weigh(logits, labels, shares, 0.5, {0: 0.0}, None, True)
    assert (found.searched_class, found.pulled_class, found.perturbed_share) == (2, 1, 0.7)
    found = weigh(logits, labels, {2: shares[2], 1: answers([2, 6, 2])}, 0.5, {0: 0.0}, None, True)
    assert (found.searched_class, found.pulled_class, found.perturbed_share) == (2, 2, 0.6)


def test_what_transfers() -> None:
    logits, labels = answers([3, 4, 3]), torch.arange(10) % 3
    found = weigh(logits, labels, {2: logits}, 0.5, {2: 0.1, 0: 0.75, 1: 0.5}, None, True)
    assert (found.transferred_class, found.transferred_share, found.transferred_second) == (0, 0.75, 0.5)
    assert (found.pulled_class, found.perturbed_share) == (2, 0.3)
    together = Evidence((found,))
    assert (together.score, together.suspect) == (pytest.approx(0.6), 0)
    assert together.report()["score"] == together.score
    only = weigh(logits, labels, {2: logits}, 0.5, {2: 0.25}, None, True)
    assert (only.transferred_class, only.transferred_share, only.transferred_second) == (2, 0.25, 0.0)


@pytest.mark.parametrize(
    ("pulled", "transferred", "score", "suspect"),
    [
        (0.5, 0.3, 0.5, 3),
        (0.47, 0.3, 0.48, 7),
        (0.9, 0.6, 1.0, 7),
        (1.0, 0.6, 1.0, 3),
        (0.0, 0.1, 0.0, 3),
        (0.3, 0.1, 0.3, 3),
    ],
)
def test_score(pulled: float, transferred: float, score: float, suspect: int) -> None:
    """The class after the one that transfers best has .1."""
    found = evidence(pulled, transferred=transferred)
    assert found.score == pytest.approx(score)
    assert found.suspect == suspect
    bounds = PruneConfig(suspicion_score=found.score, evidence_score=found.score)
    assert verdict(found, bounds) == (EVIDENCE, suspect)


@pytest.mark.parametrize(
    ("transferred_class", "wave_class", "score", "suspect", "by_wave"),
    [
        (7, 5, 0.4, 3, False),  # three classes: the most that is said of one
        (3, 5, 0.64, 3, False),  # pull and transfer name the same
        (3, 3, 0.82, 3, False),
        (5, 5, 0.42, 5, False),  # together more than the pull, though each is less
        (7, 3, 0.58, 3, False),
    ],
)
def test_what_names_the_same_class_adds_up(
    transferred_class: int, wave_class: int, score: float, suspect: int, by_wave: bool
) -> None:
    found = changed(
        evidence(0.4, transferred=0.2, wave=0.1), transferred_class=transferred_class, wave_class=wave_class
    )
    assert (found.score, found.suspect, found.by_wave) == (pytest.approx(score), suspect, by_wave)
    strong = changed(found, wave_class=3, wave_contrast=0.3)
    assert (strong.score, strong.suspect, strong.by_wave) == (
        pytest.approx(min(1.0, 0.94 + 0.24 * (transferred_class == 3))),
        3,
        True,
    )


def test_what_is_found_does_not_hang_on_the_labels() -> None:
    logits = answers([1, 2, 6, 1])
    one, other = (weigh(logits, torch.full((10,), label), {2: logits}, 0.5, {0: 0.0}, None, True) for label in (0, 2))
    assert one.perturbed_share == other.perturbed_share == 0.6
    assert one.collapse_share == other.collapse_share
    assert one.suppressed_loss > other.suppressed_loss


def test_report_is_plain_json() -> None:
    found = weigh(answers([1, 9]), torch.arange(10) % 2, {1: answers([2, 3])}, 0.5, {0: 0.0}, None, True)
    report = Evidence((found, found)).report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [one["collapse_share"] for one in report["looks"]] == [found.collapse_share] * 2
    assert report["looks"][0]["signs"][0] == {"sign": "pull", "class": 1, "counts": 0.6}
    assert report["said"][0] == {"class": 1, "counts": 0.6}
    assert (report["classes"], report["batch_norms"]) == (2, True)


def test_verdict() -> None:
    config = PruneConfig(suspicion_score=0.4, evidence_score=0.6)
    wanted = {0.1: NONE_FOUND, 0.39: NONE_FOUND, 0.4: SUSPICIOUS, 0.59: SUSPICIOUS, 0.6: EVIDENCE, 1.0: EVIDENCE}
    for share, expected in wanted.items():
        text, target = verdict(evidence(share), config)
        assert text == expected
        assert target == (None if expected == NONE_FOUND else 3)
    always = PruneConfig(suspicion_score=0, evidence_score=0)
    assert verdict(evidence(0.0, target=0), always) == (EVIDENCE, 0)


def test_suspicion_can_be_left_out() -> None:
    config = PruneConfig(suspicion_score=0.7, evidence_score=0.7)
    found = {verdict(evidence(i / 100), config)[0] for i in range(101)}
    assert found == {NONE_FOUND, EVIDENCE}


def test_no_model_is_ever_called_clean() -> None:
    shares = [i / 20 for i in range(21)]
    texts = {
        verdict(evidence(share), PruneConfig(suspicion_score=low, evidence_score=high))[0]
        for share, low, high in itertools.product(shares, repeat=3)
        if low <= high
    }
    assert texts == {"evidence of a backdoor", "suspicious", "no evidence found"}
    assert not any("clean" in text.lower() or "safe" in text.lower() for text in texts)


def test_from_logits_to_verdict() -> None:
    config = PruneConfig(suspicion_score=0.5, evidence_score=0.7)
    labels = torch.arange(10) % 5
    plain = answers([2, 2, 4, 1, 1])
    assert verdict(of_many(weigh(plain, labels, {2: answers([1, 1, 8, 0, 0])}, 0.5, {0: 0.0}, None, True)), config) == (
        EVIDENCE,
        2,
    )
    assert verdict(of_many(weigh(plain, labels, {2: answers([2, 2, 6, 0, 0])}, 0.5, {0: 0.0}, None, True)), config) == (
        SUSPICIOUS,
        2,
    )
    assert verdict(of_many(weigh(plain, labels, {2: answers([8, 0, 2, 0, 0])}, 0.5, {0: 0.0}, None, True)), config) == (
        NONE_FOUND,
        None,
    )


def test_pictures_of_few_classes_are_at_most_suspicious() -> None:
    logits, perturbed = answers([2, 2, 4, 1, 1]), {2: answers([1, 1, 8, 0, 0])}
    config = PruneConfig(suspicion_score=0.5, evidence_score=0.7)
    found = [weigh(logits, torch.arange(10) % n, perturbed, 0.5, {0: 0.0}, None, True) for n in (4, 5)]
    assert [look.classes for look in found] == [4, 5]
    assert [verdict(of_many(look), config)[0] for look in found] == [SUSPICIOUS, EVIDENCE]


def test_few_classes_are_at_most_suspicious() -> None:
    found = weigh(answers([0, 10, 0, 0]), torch.arange(10) % 4, {1: answers([0, 10, 0, 0])}, 0.5, {0: 0.0}, None, True)
    assert verdict(Evidence((found,)), PruneConfig()) == (SUSPICIOUS, 1)


def test_of_few_pictures_it_is_at_most_suspicious() -> None:
    assert verdict(changed(evidence(0.9), pictures=149), PruneConfig()) == (SUSPICIOUS, 3)
    assert verdict(changed(evidence(0.9), pictures=150), PruneConfig()) == (EVIDENCE, 3)
    first, other = replace(look(0.9), pictures=150), replace(look(0.9), pictures=75)  # a part of them
    assert verdict(Evidence((first, other)), PruneConfig()) == (EVIDENCE, 3)


def test_networks_without_batch_norms_go_by_what_transfers() -> None:
    # Perturbations fool clean ones altogether, and few have been seen: never more than suspicious.
    assert verdict(evidence(1.0, batch_norms=False), PruneConfig()) == (NONE_FOUND, None)
    assert verdict(evidence(1.0, batch_norms=False, transferred=0.35), PruneConfig()) == (NONE_FOUND, None)
    assert verdict(evidence(0.1, batch_norms=False, transferred=0.7), PruneConfig()) == (SUSPICIOUS, 7)


@pytest.mark.parametrize("share", [0.1, 0.42, 0.5, 0.7, 0.9])
def test_a_share_right_at_the_bound_counts(share: float) -> None:
    top = round(100 * share)
    perturbed = answers([top, *[1] * (100 - top)])
    found = of_many(
        weigh(
            answers([4, *[1] * (100 - top)]),
            torch.arange(104 - top) % 5,
            {0: perturbed},
            0.5,
            {0: 0.0},
            None,
            True,
        )
    )
    assert verdict(found, PruneConfig(suspicion_score=share, evidence_score=share)) == (EVIDENCE, 0)
    assert verdict(found, PruneConfig(suspicion_score=share, evidence_score=1.0))[0] == SUSPICIOUS


@pytest.mark.parametrize(
    ("pulled", "transferred", "wave", "batch_norms", "score", "suspect"),
    [
        (0.3, 0.1, 0.4, True, 0.72, 5),
        (0.3, 0.1, 0.9, True, 1.0, 5),
        (1.0, 0.1, 0.9, True, 1.0, 3),  # of equals the pull
        (0.8, 0.1, 0.4, True, 0.8, 3),
        (0.3, 0.4, 0.3, True, 0.72, 7),
        (1.0, 0.1, 0.3, False, 0.54, 5),
        (0.0, 0.0, -0.1, True, 0.0, 3),
    ],
)
def test_score_of_a_wave(
    pulled: float, transferred: float, wave: float, batch_norms: bool, score: float, suspect: int
) -> None:
    found = evidence(pulled, transferred=transferred, wave=wave, batch_norms=batch_norms)
    assert found.score == pytest.approx(score)
    assert found.suspect == suspect
    assert found.by_wave is (suspect == 5)


def test_weigh_takes_the_wave_as_it_is() -> None:
    logits, labels = answers([3, 4, 3]), torch.arange(10) % 3
    found = weigh(logits, labels, {1: logits}, 0.5, {0: 0.0}, Wave(2, 0.75, torch.zeros(3, 8, 8), 100), True)
    assert (found.wave_class, found.wave_contrast) == (2, 0.75)
    without = weigh(logits, labels, {1: logits}, 0.5, {0: 0.0}, None, True)
    assert (without.wave_class, without.wave_contrast) == (None, 0.0)


@pytest.mark.parametrize(
    ("score", "strength"),
    [(0.0, 0.0), (0.3, 0.0), (0.32, 0.0), (0.46, 0.5), (0.544, 0.8), (0.6, 1.0), (0.72, 1.0), (0.8, 1.0), (1.0, 1.0)],
)
def test_the_precaution_grows_with_the_score(score: float, strength: float) -> None:
    assert repair_strength(evidence(score), PruneConfig(suspicion_score=0.8, evidence_score=0.8)) == pytest.approx(
        strength
    )


def test_the_precaution_goes_by_the_bound_of_evidence() -> None:
    config = PruneConfig(suspicion_score=0.55, evidence_score=0.8)
    assert repair_strength(evidence(0.46), config) == pytest.approx(0.5)
    assert repair_strength(evidence(0.55), config) == 1.0  # suspected


def test_the_precaution_is_at_least_a_fifth_where_the_search_pulls_nearly_all() -> None:
    config = PruneConfig(suspicion_score=0.8, evidence_score=0.8)
    found = changed(evidence(0.1), searched_share=0.85)
    assert repair_strength(found, config) == pytest.approx(0.2)
    assert repair_strength(changed(found, searched_share=0.849), config) == 0.0
    assert repair_strength(changed(found, batch_norms=False), config) == 0.0  # clean ViTs are pulled whole too
    assert repair_strength(changed(evidence(0.46), searched_share=1.0), config) == pytest.approx(0.5)
    first, other = found.looks[0], replace(look(0.1), searched_share=0.2)
    assert repair_strength(Evidence((first, other)), config) == pytest.approx(0.2)
    assert repair_strength(Evidence((other, first)), config) == 0.0


def test_where_everything_is_suspicious_the_repair_is_whole() -> None:
    assert repair_strength(evidence(0.0), PruneConfig(suspicion_score=0.0)) == 1.0


def test_below_evidence_the_repair_minds_the_classes_that_were_looked_at_too() -> None:
    config = PruneConfig(suspicion_score=0.5, evidence_score=0.8)
    found = changed(evidence(0.6, wave=0.4), searched_class=2)  # the wave, .72 of class 5, before the pull into 3
    assert found.suspect == 5
    assert repair_classes(found, config) == [5, 2, 3]
    assert repair_classes(changed(found, searched_class=3), config) == [5, 3]
    assert repair_classes(changed(found, wave_contrast=0.5), config) == [5]
    assert repair_classes(changed(found, wave_contrast=0.0, perturbed_share=0.4), config) == [2, 3]
    # However high, a score without BatchNorm is never more than suspicious; the repair goes by the score.
    assert repair_classes(changed(found, wave_contrast=0.5, batch_norms=False), config) == [5]


# ---------------------------------------------------------------- several looks
def test_what_is_said_of_a_class_is_its_mean_over_the_looks() -> None:
    one = replace(look(0.4, target=3, transferred=0.2, wave=0.5), wave_class=3)  # 1.3 of class 3, .24 of class 7
    other = replace(look(0.5, target=7, wave=0.25), transferred_class=1)  # .5 of class 7, .45 of class 5
    both = Evidence((one, other))
    assert both.said == pytest.approx({3: 0.5, 7: 0.37, 5: 0.225, 1: 0.0})
    assert list(both.said) == [3, 7, 5, 1]
    assert (both.score, both.suspect) == (0.5, 3)
    assert Evidence((other, one)).said == pytest.approx(both.said)
    assert verdict(both, PruneConfig(suspicion_score=0.4, evidence_score=0.6)) == (SUSPICIOUS, 3)
    assert [said["class"] for said in both.report()["said"]] == [3, 7, 5, 1]


def test_two_looks_at_different_classes_are_worth_half() -> None:
    assert Evidence((look(1.0, target=3), look(1.0, target=8))).score == 0.5
    assert Evidence((look(1.0, target=3), look(1.0, target=3))).score == 1.0


def test_of_equal_classes_the_one_with_the_greater_sums() -> None:
    wave = replace(look(1.0, target=3, transferred=0.2, wave=0.6), transferred_class=5)
    assert (Evidence((wave,)).score, Evidence((wave,)).suspect) == (1.0, 5)  # 1.0 of class 3, 1.24 of class 5
    assert Evidence((replace(wave, transferred_share=0.1),)).suspect == 3  # both 1.0: the first that is named


def test_by_wave_goes_by_all_looks() -> None:
    pulled, waved = look(0.9, target=5, wave=0.1), look(0.1, target=5, wave=0.5)
    assert not Evidence((pulled,)).by_wave
    assert Evidence((waved,)).by_wave
    assert Evidence((pulled, waved)).by_wave  # .18 and .9 in place of .9 and .1
    assert not Evidence((pulled, replace(waved, wave_contrast=0.4))).by_wave


@pytest.mark.parametrize(
    ("looks", "said", "wanted"),
    [
        (1, [0.9], False),
        (2, [0.39], False),
        (2, [0.41], True),
        (2, [0.9, 0.9], False),
        (3, [0.34], False),  # less than half of what is evidence
        (3, [0.36], True),
        (3, [0.36, 0.75], True),
        (3, [0.36, 0.73], False),
        (3, [0.34, 1.0], False),
        (3, [0.9, 0.9, 0.9], False),
    ],
)
def test_another_look_where_it_could_still_make_a_class_suspicious(looks: int, said: list[float], wanted: bool) -> None:
    config = PruneConfig(looks=looks, suspicion_score=0.7, evidence_score=0.7)
    assert undecided([look(share) for share in said], config) is wanted


def test_the_look_that_says_most_of_the_suspect() -> None:
    looks = look(0.2, target=3), look(0.9, target=3), look(1.0, target=8)
    assert Evidence(looks).telling == 1
    assert Evidence(looks[1:]).telling == 1  # .5 for class 8
    assert Evidence((looks[0], looks[0])).telling == 0


def test_the_precaution_goes_by_the_first_look() -> None:
    config = PruneConfig(suspicion_score=0.7, evidence_score=0.8)
    found = Evidence((look(0.56, target=3), look(1.0, target=8)))
    assert (found.score, found.suspect) == (0.5, 8)
    assert repair_strength(found, config) == pytest.approx(6 / 7)
    assert repair_strength(Evidence((look(0.6), look(1.0))), config) == 1.0
    assert repair_strength(Evidence((look(0.3), look(1.0, target=8))), config) == 0.0


def test_repair_minds_the_classes_of_the_first_look() -> None:
    config = PruneConfig(suspicion_score=0.5, evidence_score=0.8)
    first, other = replace(look(0.6), searched_class=2), replace(look(0.8, target=9), searched_class=6)
    assert repair_classes(Evidence((first, other, look(0.8, target=9))), config) == [9, 2, 3]
    assert repair_classes(Evidence((first, other)), config) == [2, 3]
    assert repair_classes(Evidence((look(0.9), replace(look(0.8), searched_class=6))), config) == [3]
