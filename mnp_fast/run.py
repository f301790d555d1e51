"""One run: its checked input, its working copies, and the stages, each from the checkpoint or computed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnp_fast import __version__
from mnp_fast.checkpoint import Checkpoint, StageState, fingerprint, restore_
from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet, check_model, collect, floating_parameter
from mnp_fast.detect import Evidence, Look, commonest, repair_classes, undecided, verdict, weigh
from mnp_fast.device import compute_device, peak_mb, product_dtype
from mnp_fast.errors import ConfigError, ModelError
from mnp_fast.graph.capture import capture
from mnp_fast.io import model_tensors
from mnp_fast.masked import Execution, masked, prune_
from mnp_fast.memory import kept
from mnp_fast.ops import registry
from mnp_fast.optimize import (
    Trace,
    finetune_,
    learn_masks,
    perturb,
    perturbed,
    predict,
    recalibrate_,
    suppress_,
)
from mnp_fast.progress import Progress
from mnp_fast.replay import Recorder
from mnp_fast.result import PruneResult
from mnp_fast.select import Selection, select
from mnp_fast.sites import find_sites, site_names
from mnp_fast.stats import magnitude
from mnp_fast.trial import accuracy_on, check_gradients
from mnp_fast.waves import Wave, find_wave

_CANDIDATES = 10
"""Classes of the suppressed model that the search tries, commonest first."""
_FEWEST = 60
"""Learning pictures of a look after the first; with fewer it learns from all of them."""
_APART = 1_000_003
"""Between the seed of a run and that of its looks after the first: far from what users try one after the other."""


@dataclass
class Run:
    """One run: its checked input, its working copies and its history."""

    model: nn.Module
    loader: Any
    given_config: PruneConfig | None
    given_device: torch.device | str | None
    seed: int
    progress: bool
    checkpoint_directory: str | os.PathLike[str] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = PruneConfig() if self.given_config is None else self.given_config
        if not isinstance(self.config, PruneConfig):
            raise ConfigError(f"config is a {type(self.config).__name__}; give a mnp_fast.PruneConfig")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; give a whole number from 0 to 2**63 - 1")
        self.data = collect(self.loader, seed=self.seed).in_float32()
        self.classes = check_model(self.model, self.data)
        own = floating_parameter(self.model)
        if own is None:
            raise ModelError("the model has no parameters, and so nothing to prune; give a network with weights")
        self.device = own.device if self.given_device is None else compute_device(self.given_device)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.learning, self.held = self.data.split(self.config.held_back, self.generator)
        self.data, self.learning, self.held = (part.on(self.device) for part in (self.data, self.learning, self.held))
        # The copy that is masked; float32, since steps of masks and weights are lost in half precision.
        self.plain = self.working_copy()
        self.sites = find_sites(self.plain, self.data.images[:2].to(self.device))
        self.magnitude = magnitude(self.plain, self.sites)
        captured = capture(self.plain, self.sites, self.data.images[:2].to(self.device))
        recorder = Recorder(self.device) if self.device.type == "cuda" else None
        self.how = Execution(captured, product_dtype(self.config.precision, self.device), recorder)
        check_gradients(self.plain, self.data.images[:2], self.how)
        self.accuracy = accuracy_on(self.plain, self.sites, self.data, self.config, self.how)
        self.bar = Progress(self.progress)
        self.waves: list[Wave] = []
        run = {} if self.checkpoint_directory is None else self.fingerprint()
        self.checkpoint = Checkpoint(self.checkpoint_directory, run, self.generator, self.device)

    def working_copy(self) -> nn.Module:
        """A copy of the caller's model on the device of the run, in float32, every weight trainable."""
        working = copy.deepcopy(self.model).to(self.device).float().eval()
        for parameter in working.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return working

    @contextmanager
    def stages(self) -> Iterator[None]:
        """Seeds whatever a model draws by itself, leaves the caller's random state alone, ends the progress bar."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with self.bar, kept(), torch.random.fork_rng(devices=cuda):
            # Not torch.manual_seed: that would seed other GPUs too, which are not put back.
            torch.default_generator.manual_seed(self.seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self.seed)
            yield

    def expose(self) -> tuple[nn.Module, Evidence]:
        """A suppressed model, its BatchNorm statistics recalibrated, and what all looks say.

        It is that of the first look; where a class is suspected, of the one that says most of it.
        """
        found = [self.look(self.learning, self.data, "")]
        with self.drawn_apart():
            for number, (learning, shown) in enumerate(self.parts(), 2):
                if not undecided([look for _, look in found], self.config):
                    break
                found.append(self.look(learning, shown, f"-{number}"))
        evidence = Evidence(tuple(look for _, look in found))
        suspected = verdict(evidence, self.config)[1] is not None
        return found[evidence.telling if suspected else 0][0], evidence

    @contextmanager
    def drawn_apart(self) -> Iterator[None]:
        """Draws from a seed of its own: what comes after the block draws the same with and without it."""
        state = self.generator.get_state()
        self.generator.manual_seed((self.seed + _APART) % 2**63)
        try:
            yield
        finally:
            self.generator.set_state(state)

    def parts(self) -> Iterator[tuple[DefenceSet, DefenceSet]]:
        """For each look after the first the pictures that it learns from, and these with held-back ones, which it is
        shown: parts of nearly equal size, or all of them each time where a part had too few."""
        count = self.config.looks - 1
        few = len(self.learning) < count * _FEWEST
        both = [part.dealt(1 if few else count, self.generator) for part in (self.learning, self.held)]
        for own, others in zip(*(parts * count if few else parts for parts in both), strict=True):
            learning = self.learning.subset(own)
            yield learning, learning.joined(self.held.subset(others))

    def look(self, learning: DefenceSet, shown: DefenceSet, suffix: str) -> tuple[nn.Module, Look]:
        """A model suppressed on ``learning``, its BatchNorm statistics recalibrated, and what it says of ``shown``.

        suffix: of the names of its stages.
        """
        suppressed = self.working_copy()

        def suppress(entry: dict[str, Any]) -> StageState:
            trace = suppress_(suppressed, learning, self.config, self.generator, self.bar, self.how)
            entry |= _ends(trace) | {"windows": len(trace.loss), "rate": trace.rate[-1], "pictures": len(learning)}
            recalibrate_(suppressed, learning, self.config)
            return StageState(model_tensors(suppressed))

        def search(entry: dict[str, Any]) -> StageState:
            pulls, transferred = self.search(suppressed, learning)
            # Of a hundred pictures all are pulled into several classes; what is near the trigger fools the model too.
            searched = max(pulls, key=lambda one: (pulls[one], transferred[one]))
            size = self.config.perturbation_size
            wave = find_wave(self.plain, self.sites, learning, size, self.config, self.bar, self.how)
            entry |= {"class": searched, "tried": len(pulls), "waved": 0 if wave is None else wave.waved}
            found = {"searched": searched, "share": pulls[searched], "transferred": list(transferred.items())}
            if wave is None:
                return StageState(values=found)
            found["wave"] = {"target": wave.target, "contrast": wave.contrast, "waved": wave.waved}
            return StageState({"wave": wave.picture}, found)

        def weighed(entry: dict[str, Any]) -> StageState:
            logits = self.suppressed_logits(suppressed, shown)
            classes = list(dict.fromkeys([searched, *commonest(logits, 1)]))
            answers = self.perturbed_logits(suppressed, classes, learning, shown, entry)
            # Those that a forward reaches: of a head that is never called nothing is normalised.
            norms = any(site.kind == "batch_norm" for site in self.sites)
            return StageState(values=asdict(weigh(logits, shown.labels, answers, share, transferred, wave, norms)))

        restore_(suppressed, self.once(f"suppress{suffix}", suppress).tensors)
        found = self.once(f"search{suffix}", search)
        searched, transferred = found.values["searched"], dict(map(tuple, found.values["transferred"]))
        share = found.values["share"]
        wave = None
        if "wave" in found.values:
            wave = Wave(picture=found.tensors["wave"].to(self.device), **found.values["wave"])
            self.waves.append(wave)
        return suppressed, Look(**self.once(f"weigh{suffix}", weighed).values)

    def perturbed_logits(
        self,
        suppressed: nn.Module,
        classes: list[int],
        learning: DefenceSet,
        shown: DefenceSet,
        entry: dict[str, Any],
    ) -> dict[int, Tensor]:
        """By class (k, all classes): logits for the pictures of other classes in ``shown``, perturbed towards it."""
        # As many perturbations for two classes as for one.
        each = [one for one in classes for _ in range(max(1, self.config.perturbations // len(classes)))]
        size = self.config.evidence_size
        found = self.perturbations("weigh", suppressed, each, learning, size, batch_statistics=True)
        answers: dict[int, list[Tensor]] = {one: [] for one in classes}
        for target, perturbation in zip(each, found, strict=True):
            answers[target].append(self.suppressed_logits(suppressed, perturbed(shown, target, perturbation)))
        entry |= {"classes": classes, "perturbations": len(each)}
        return {one: torch.cat(answers[one]) for one in classes}

    def search(self, suppressed: nn.Module, learning: DefenceSet) -> tuple[dict[int, float], dict[int, float]]:
        """By class, what a small perturbation pulls there (`pulled`): in the suppressed model, on which it is made with
        recalibrated statistics, and in the model itself."""
        logits = predict(suppressed, learning, self.config.batch_size, self.device)
        tried = commonest(logits, _CANDIDATES)
        # Smaller than for repair: what is large pulls into every class.
        size, steps = self.config.perturbation_size / 4, self.config.perturbation_steps
        # Halfway they fool the model itself least into classes that are not the target (docs/decisions.md).
        early = self.perturbations("search", suppressed, tried, learning, size, max(1, steps // 2))
        transferred = self.pulled(self.plain, early, tried, learning)
        found = self.perturbations("search", suppressed, tried, learning, size, steps, start=early)
        return self.pulled(suppressed, found, tried, learning), transferred

    def perturb(self, suppressed: nn.Module, evidence: Evidence, target: int | None, config: PruneConfig) -> Tensor:
        """Perturbations for masks and fine-tuning, towards `repair_classes`: made on the model itself where a class is
        suspected, or else half of them on the suppressed model. config: settings of the repair.

        Where the verdict rests on a wave it makes as many more: alone it left BadNets, which it had named, as it was.
        """
        networks = [suppressed, self.plain] if target is None else [self.plain]
        classes = repair_classes(evidence, self.config)
        towards = [classes[n // len(networks) % len(classes)] for n in range(self.config.perturbations)]
        parts = [(network, towards[n :: len(networks)]) for n, network in enumerate(networks)]

        def made(entry: dict[str, Any]) -> StageState:
            given = [(network, part) for network, part in parts if part]
            size, steps = config.perturbation_size, config.perturbation_steps
            each = [self.perturbations("perturb", network, part, self.learning, size, steps) for network, part in given]
            return StageState({"perturbations": torch.cat(each)})

        found = self.once("perturb", made).tensors["perturbations"].to(self.device)
        if target is not None and evidence.by_wave:
            wave = max((wave for wave in self.waves if wave.target == target), key=lambda wave: wave.contrast)
            found = torch.cat([found, wave.picture.expand_as(found)])
        return found

    def pulled(
        self, network: nn.Module, perturbations: Tensor, targets: list[int], learning: DefenceSet
    ) -> dict[int, float]:
        """By target, the share of the pictures of other classes that go there with its perturbation."""
        found = {}
        with masked(network, self.sites, torch.ones_like(self.magnitude), how=self.how):
            for target, perturbation in zip(targets, perturbations, strict=True):
                images = perturbed(learning, target, perturbation)
                logits = predict(network, images, self.config.batch_size, self.device)
                found[target] = float((logits.argmax(1) == target).double().mean())
        return found

    def perturbations(
        self,
        stage: str,
        network: nn.Module,
        targets: list[int],
        learning: DefenceSet,
        size: float,
        steps: int | None = None,
        start: Tensor | None = None,
        batch_statistics: bool = False,
    ) -> Tensor:
        steps = self.config.perturbation_steps if steps is None else steps
        self.bar.stage(stage, len(targets) * steps)
        return perturb(
            network,
            targets,
            self.sites,
            learning,
            self.config,
            self.generator,
            self.bar,
            self.how,
            size=size,
            steps=steps,
            start=start,
            batch_statistics=batch_statistics,
        )

    def suppressed_logits(self, suppressed: nn.Module, data: DefenceSet) -> Tensor:
        with masked(suppressed, (), None, batch_statistics=True, how=self.how):
            return predict(suppressed, data, self.config.batch_size, self.device)

    def learn_masks(self, suppressed: nn.Module, perturbations: Tensor) -> tuple[Tensor, Tensor]:
        def masks(entry: dict[str, Any]) -> StageState:
            mask, order, trace = learn_masks(
                self.plain,
                suppressed,
                perturbations,
                self.sites,
                self.magnitude,
                self.learning,
                self.config,
                self.generator,
                self.bar,
                self.how,
            )
            entry |= _ends(trace) | {"steps": len(trace.loss), "below_one": int((mask < 1).sum())}
            return StageState({"mask": mask, "order": order})

        found = self.once("masks", masks).tensors
        return found["mask"].to(self.device), found["order"].to(self.device)

    def select(self, mask: Tensor, order: Tensor, limit: float) -> Selection:
        def selected(entry: dict[str, Any]) -> StageState:
            self.bar.stage("select", None)
            chosen = select(mask, order, self.plain, self.sites, self.learning, self.held, limit, self.config, self.how)
            with masked(self.plain, self.sites, chosen.keep.float(), how=self.how):
                entry |= self.held_back_metrics(self.plain)
            counts = {"low": chosen.low, "pruned": chosen.pruned}
            entry |= counts
            return StageState({"keep": chosen.keep}, {"threshold": chosen.threshold} | counts)

        found = self.once("select", selected)
        return Selection(keep=found.tensors["keep"].to(self.device), **found.values)

    def untouched(self) -> tuple[Tensor, Selection, nn.Module]:
        """Masks of ones, nothing pruned, the model as it came."""
        ones = torch.ones_like(self.magnitude)
        return ones, Selection(ones.bool(), -1.0, 0, 0), copy.deepcopy(self.model).eval()

    def repair(self, chosen: Selection, perturbations: Tensor, config: PruneConfig) -> nn.Module:
        """A pruned and fine-tuned copy, in the precision, on the device and with the flags of the caller's model."""
        repaired = copy.deepcopy(self.model).eval()
        if not chosen.pruned and not config.finetune_epochs:
            return repaired  # not by way of float32
        working = self.working_copy()
        prune_(working, self.sites, chosen.keep)

        def finetune(entry: dict[str, Any]) -> StageState:
            trace = finetune_(
                working,
                self.plain,
                self.sites,
                chosen.keep,
                perturbations,
                self.learning,
                config,
                self.generator,
                self.bar,
                self.how,
            )
            entry |= _ends(trace)
            return StageState(model_tensors(working))

        if config.finetune_epochs:
            restore_(working, self.once("fine-tune", finetune).tensors)
        repaired.load_state_dict(working.state_dict())
        return repaired

    def held_back_metrics(self, network: nn.Module) -> dict[str, float]:
        out = predict(network, self.held, self.config.batch_size, self.device)
        accuracy = float((out.argmax(1) == self.held.labels).float().mean())
        return {"loss": float(F.cross_entropy(out, self.held.labels)), "accuracy": accuracy}

    def once(self, name: str, compute: Callable[[dict[str, Any]], StageState]) -> StageState:
        """A stage: from the checkpoint where it is there, else computed and kept. ``compute`` gets its entry."""
        state = self.checkpoint.read(name)
        if state is None:
            with self.stage(name) as entry:
                state = compute(entry)
            self.checkpoint.write(name, replace(state, entry=entry))
        else:
            self.history.append(dict(state.entry))
        return state

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a stage; what the block adds to the entry goes into the history."""
        entry: dict[str, Any] = {"stage": name}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield entry
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        entry |= {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(self.device)}
        self.history.append(entry)

    def fingerprint(self) -> dict[str, str]:
        products = str(self.how.dtype or torch.float32)
        return fingerprint(self.model, self.data, self.config, self.seed, self.device, products)

    def report(self) -> dict[str, Any]:
        """What is known before any result: input, settings, versions."""
        return {
            "mnp_fast": __version__,
            "torch": torch.__version__,
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "device": str(self.device),
            "seed": self.seed,
            "pictures": {"learning": len(self.learning), "held_back": len(self.held)},
            "config": asdict(self.config),
            "graph": self.how.captured is not None and (self.how.captured.reason or "captured"),
            "cuda_graphs": self.how.recorder is not None and (self.how.recorder.reason or "captured"),
            "kernels": registry.running(self.device, torch.float32),
            "products": str(self.how.dtype or torch.float32).removeprefix("torch."),
            "classes": self.classes,
            "sites": len(self.sites),
            "neurons": int(self.magnitude.numel()),
            "accuracy": self.accuracy,
        }

    def result(
        self,
        evidence: Evidence,
        strength: float,
        mask: Tensor,
        selection: Selection,
        repaired: nn.Module,
        triggered: DefenceSet | None,
    ) -> PruneResult:
        found, target = verdict(evidence, self.config)
        mask = mask.cpu()
        gone = (~selection.keep).cpu()
        places = [slice(site.offset, site.offset + site.neurons) for site in self.sites]
        parts = dict(zip(site_names(self.sites), places, strict=True))
        return PruneResult(
            model=repaired,
            masks={name: mask[part].clone() for name, part in parts.items()},
            pruned={name: gone[part].nonzero().flatten().tolist() for name, part in parts.items()},
            threshold=selection.threshold,
            verdict=found,
            suspected_target=target,
            evidence=evidence.report(),
            metrics=self.metrics(repaired, triggered),
            history=self.history,
            run=self.report() | {"repair_strength": strength},
        )

    def metrics(self, repaired: nn.Module, triggered: DefenceSet | None) -> dict[str, float]:
        """Clean accuracy on held-back pictures; with triggered pictures also ASR and DER, before and after."""
        was = copy.deepcopy(self.model).eval()
        own = floating_parameter(was)
        assert own is not None
        accuracy = [_accuracy(network, self.held, self.config, own) for network in (was, repaired)]
        out = {"clean_accuracy_before": accuracy[0], "clean_accuracy_after": accuracy[1], "held_back": len(self.held)}
        if triggered is not None:
            asr = [_accuracy(network, triggered, self.config, own) for network in (was, repaired)]
            out |= {"asr_before": asr[0], "asr_after": asr[1]}
            out["der"] = (max(0.0, asr[0] - asr[1]) - max(0.0, accuracy[0] - accuracy[1]) + 1) / 2
        return out


def _accuracy(network: nn.Module, data: DefenceSet, config: PruneConfig, like: Tensor) -> float:
    """Share of pictures put into the class of their label, by the network as the caller has it."""
    out = predict(network, DefenceSet(data.images.to(like.dtype), data.labels), config.batch_size, like.device)
    return int((out.argmax(1) == data.labels).sum()) / len(data)


def _ends(trace: Trace) -> dict[str, Any]:
    return {"loss": trace.loss[-1], "accuracy": trace.accuracy[-1]}
