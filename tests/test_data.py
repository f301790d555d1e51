"""The defence set: every input that cannot be used gets its own error, and reading and splitting are exact."""

from __future__ import annotations

import random
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from mnp_fast.data import MIN_PICTURES, DefenceSet, _memory_limit, check_model, collect, logits_of
from mnp_fast.errors import ConfigError, DataError, MnpFastError, ModelError
from mnp_fast.trial import check_answers


def pictures(n: int = 40, classes: int = 4, shape: tuple[int, ...] = (3, 6, 6)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(n) % classes


def small_net(classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes)
    )


X, Y = pictures()
X_NAN = X.clone()
X_NAN[7, 0, 0, 0] = float("nan")
X_INF = X.clone()
X_INF[0] = float("inf")

BAD_LOADERS = {
    "empty": ([], "is empty"),
    "empty batches": ([(X[:0], Y[:0])], "is empty"),
    "iterator": (iter([(X, Y)]), "one-pass list_iterator"),
    "generator": (((x, y) for x, y in [(X, Y)]), "one-pass generator"),
    "not iterable": (3, "cannot be iterated"),
    "float labels": ([(X, Y.float())], r"torch\.float32; give class indices"),
    "one-hot labels": ([(X, nn.functional.one_hot(Y))], r"\(40, 4\), not \(batch,\); give class indices"),
    "data set": ([(X[0], 1)], "wrap the data set in a DataLoader"),
    "text labels": ([(X, ["cat"] * 40)], "labels of batch 0 .* are a list"),
    "negative": ([(X, Y - 1)], "go down to -1"),
    "nan": ([(X_NAN, Y)], "image 7 of batch 0 .* NaN or Inf"),
    "inf": ([(X, Y), (X_INF, Y)], "image 0 of batch 1 .* NaN or Inf"),
    "integers": ([((X * 255).to(torch.uint8), Y)], r"torch\.uint8; scale and normalise"),
    "shapes": ([(X, Y), (X[..., :5], Y)], r"shape \(3, 6, 5\), the batches before it \(3, 6, 6\)"),
    "collation": (DataLoader([(X[0], 0), (X[0, :, :3], 1)], batch_size=2), "failed on batch 0 .*stack"),
    "counts": ([(X, Y[:39])], "40 images but 39 labels"),
    "not a pair": ([(X, Y, Y)], "a tuple of 3 items, not a pair"),
    "images alone": ([X], "a Tensor, not a pair"),
    "wrong keys": ([{"x": X, "y": Y}], "mapping with the keys x, y; it needs 'pixel_values' and 'labels'"),
    "list of images": ([(list(X), Y)], "images of batch 0 .* are a list"),
    "one dimension": ([(X[:, 0, 0, 0], Y)], "must be a batch"),
    "one class": ([(X, torch.full_like(Y, 3))], "have label 3; at least 2 classes"),
    "too few": ([(X[: MIN_PICTURES - 1], Y[: MIN_PICTURES - 1])], f"only {MIN_PICTURES - 1} pictures"),
}


@pytest.mark.parametrize("case", BAD_LOADERS)
def test_unusable_loaders_are_refused_with_their_cause(case: str) -> None:
    loader, cause = BAD_LOADERS[case]
    with pytest.raises(DataError, match=cause) as caught:
        collect(loader)
    assert isinstance(caught.value, MnpFastError)


def test_an_endless_loader_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def __iter__(self):
            while True:
                yield X, Y

    monkeypatch.setattr("mnp_fast.data._memory_limit", lambda: 10.0 * X.nbytes)
    with pytest.raises(DataError, match="or never ends"):
        collect(Endless())


@pytest.mark.parametrize("keys", [("pixel_values", "labels"), ("image", "label"), ("images", "label")])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mappings_are_read(keys: tuple[str, str], kind: type) -> None:
    data = collect([kind({keys[0]: X, keys[1]: Y, "idx": 3})])
    assert torch.equal(data.images, X)
    assert torch.equal(data.labels, Y)


def test_lists_arrays_and_small_integers_are_read() -> None:
    data = collect([[X.numpy(), Y.numpy().astype(np.uint8)], [X, Y.tolist()]])
    assert torch.equal(data.images, torch.cat([X, X]))
    assert data.labels.dtype == torch.int64
    assert torch.equal(data.labels, torch.cat([Y, Y]))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(given: torch.dtype, kept: torch.dtype) -> None:
    data = collect([(X.to(given), Y)])
    assert data.images.dtype == kept
    assert torch.equal(data.images, X.to(given).to(kept))


@pytest.mark.parametrize("given", [X.numpy()[:, ::-1], X.numpy().astype(">f4")])
def test_arrays_that_torch_does_not_take(given: Any) -> None:
    found = collect([(given, Y)]).images.numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, given)


def test_a_loader_that_reuses_its_buffer_is_read_rightly() -> None:
    class Reusing:
        def __iter__(self):
            images = torch.empty(10, 3, 6, 6)
            for start in range(0, 40, 10):
                images.copy_(X[start : start + 10])
                yield images, Y[start : start + 10]

    assert torch.equal(collect(Reusing()).images, X)


class Augmented(Dataset):
    """Draws from every global random state, as augmentations do."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + random.random() + np.random.rand() + torch.rand(()), Y[i]  # noqa: NPY002


@pytest.mark.parametrize("own", ["", "generator", "batch sampler"])
def test_the_same_seed_reads_a_shuffling_loader_alike_and_leaves_random_states_alone(own: str) -> None:
    generator = torch.Generator().manual_seed(5) if own else None
    loader: DataLoader[Any] = DataLoader(Augmented(), batch_size=16, shuffle=True, generator=generator)
    if own == "batch sampler":
        sampler = RandomSampler(Augmented(), generator=generator)
        loader = DataLoader(Augmented(), batch_sampler=BatchSampler(sampler, 16, drop_last=False))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = collect(loader, seed=3), collect(loader, seed=3), collect(loader, seed=4)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    if generator is not None:
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_the_loader_is_read_once() -> None:
    class Counting:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield X, Y

    loader = Counting()
    collect(loader)
    assert loader.passes == 1


@pytest.mark.parametrize(("n", "classes", "share"), [(40, 4, 0.2), (22, 20, 0.1), (500, 10, 0.2), (23, 2, 0.01)])
def test_split_is_stratified_whole_and_deterministic(n: int, classes: int, share: float) -> None:
    images, labels = torch.arange(float(n))[:, None], torch.arange(n) % classes
    data = DefenceSet(images, labels)
    learning, held = data.split(share, torch.Generator().manual_seed(2))
    assert torch.cat([learning.images, held.images]).flatten().sort().values.tolist() == list(range(n))
    assert len(held) >= 1
    assert set(learning.labels.tolist()) == set(range(classes))
    again = data.split(share, torch.Generator().manual_seed(2))
    assert torch.equal(again[1].images, held.images)
    if n == 500:
        assert torch.bincount(held.labels).tolist() == [10] * 10
        assert not torch.equal(data.split(share, torch.Generator().manual_seed(3))[1].images, held.images)


def test_split_keeps_to_the_shares_of_unequal_classes() -> None:
    labels = torch.tensor([0] * 300 + [1] * 90 + [2] * 9 + [5])
    held = DefenceSet(torch.zeros(400, 1), labels).split(0.25, torch.Generator())[1]
    assert torch.bincount(held.labels, minlength=6).tolist() == [75, 23, 2, 0, 0, 0]


def test_split_of_few_pictures_a_class_does_not_hold_back_the_lowest_classes() -> None:
    labels = torch.arange(400) % 100
    first, other = (
        DefenceSet(torch.zeros(400, 1), labels).split(0.2, torch.Generator().manual_seed(seed))[1] for seed in (0, 1)
    )
    assert torch.bincount(first.labels, minlength=100).max() == 1
    assert len(first) == 80
    assert first.labels.max() > 90
    assert not torch.equal(first.labels.sort().values, other.labels.sort().values)


def test_split_of_one_picture_a_class_still_holds_back_the_share() -> None:
    learning, held = DefenceSet(torch.zeros(100, 1), torch.arange(100)).split(0.2, torch.Generator())
    assert (len(learning), len(held)) == (80, 20)


def test_split_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        DefenceSet(X, Y).split(1.0, torch.Generator())
    with pytest.raises(DataError, match="cannot be split"):
        DefenceSet(X[:1], Y[:1]).split(0.5, torch.Generator())


def test_batches_in_order() -> None:
    got = list(DefenceSet(X, Y).batches(13, device="cpu"))
    assert [len(y) for _, y in got] == [13, 13, 14]
    assert torch.equal(torch.cat([x for x, _ in got]), X)
    assert [len(y) for _, y in DefenceSet(X, Y).batches(16)] == [16, 16, 8]
    assert [len(y) for _, y in DefenceSet(X, Y).batches(1)] == [1] * len(X)


@pytest.mark.parametrize(
    ("n", "size", "expected"), [(40, 13, [13, 13, 14]), (40, 16, [16, 16, 8]), (5, 1, [2, 3]), (1, 8, [1])]
)
def test_shuffled_batches_are_never_single(n: int, size: int, expected: list[int]) -> None:
    data = DefenceSet(torch.arange(float(n))[:, None], torch.arange(n))
    got = list(data.batches(size, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in got] == expected
    assert torch.cat([y for _, y in got]).sort().values.tolist() == list(range(n))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in got)
    again = list(data.batches(size, torch.Generator().manual_seed(0)))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(got, again, strict=True))


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        next(DefenceSet(X, Y).batches(0))


def test_check_model_counts_the_classes_and_changes_nothing() -> None:
    model = small_net(7).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state()
    assert check_model(model, DefenceSet(X, Y)) == 7
    assert model.training
    assert not model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states)


class Answering(nn.Module):
    """A model with a given answer."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor):
        return self.answer(x)


def damaged(where: str, value: float) -> nn.Module:
    model = small_net()
    with torch.no_grad():
        model.get_submodule("1").get_buffer(where)[2] = value if where else 0
    return model


def damaged_weight(value: float) -> nn.Module:
    model = small_net()
    with torch.no_grad():
        model[5].weight[1, 1] = value
    return model


BAD_MODELS = {
    "not a module": (lambda: lambda x: x, ModelError, "is a function, not a torch.nn.Module"),
    "nan weight": (lambda: damaged_weight(float("nan")), ModelError, "parameter 5.weight has NaN or Inf"),
    "inf weight": (lambda: damaged_weight(float("-inf")), ModelError, "parameter 5.weight has NaN or Inf"),
    "nan buffer": (lambda: damaged("running_var", float("nan")), ModelError, "buffer 1.running_var has NaN or Inf"),
    "lazy": (lambda: nn.LazyLinear(4), ModelError, "has no values yet"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), ModelError, "has no values yet"),
    "shape": (lambda: nn.Linear(9, 4), DataError, r"images, shape \(3, 6, 6\) .*mat1 and mat2"),
    "labels": (lambda: small_net(3), DataError, r"labels go up to 3, but the model has 3 classes \(0 to 2\)"),
    "no logits": (lambda: Answering(lambda x: {"features": x}), ModelError, "dict without logits"),
    "pair": (lambda: Answering(lambda x: (x, x)), ModelError, "tuple without logits"),
    "map of logits": (lambda: Answering(lambda x: x), ModelError, r"shape \(8, 3, 6, 6\) .*not \(batch, classes\)"),
    "one for all": (lambda: Answering(lambda x: x[:1, 0, 0]), ModelError, r"shape \(1, 6\)"),
    "class indices": (lambda: Answering(lambda x: x[:, 0, 0].long()), ModelError, r"torch.int64\), not"),
    "one logit": (lambda: small_net(1), ModelError, "single output"),
    "nan logits": (lambda: Answering(lambda x: x[:, 0, 0] / 0 * 0), ModelError, "logits have NaN or Inf"),
    "softmax": (lambda: nn.Sequential(small_net(), nn.Softmax(1)), ModelError, "remove its last softmax"),
    "not copyable": (lambda: Answering(x for x in ()), ModelError, "cannot be copied"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_unusable_models_are_refused_with_their_cause(case: str) -> None:
    make, kind, cause = BAD_MODELS[case]
    with pytest.raises(kind, match=cause):
        check_model(make(), DefenceSet(X, Y))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)])
def test_logits_are_found(wrap) -> None:
    assert logits_of(wrap(X)) is X


@pytest.mark.parametrize(("n", "count"), [(40, 1), (40, 2), (41, 3), (5, 2), (1, 2), (0, 2)])
def test_dealt_parts(n: int, count: int) -> None:
    labels = torch.randint(4, (n,), generator=torch.Generator().manual_seed(1))
    data = DefenceSet(torch.arange(float(n))[:, None], labels)
    parts = data.dealt(count, torch.Generator().manual_seed(3))
    again = data.dealt(count, torch.Generator().manual_seed(3))
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for label in range(4):
        share = [int((labels[part] == label).sum()) for part in parts]
        assert max(share) - min(share) <= 1
    assert len(data.joined(data.subset(parts[0]))) == n + len(parts[0])


# ---------------------------------------------------------------- what the model makes of the pictures
def test_answers_must_agree_with_the_labels() -> None:
    labels = torch.arange(100) % 10
    assert check_answers(labels, labels) == 1.0
    half = torch.where(torch.arange(100) < 50, labels, (labels + 1) % 10)
    assert check_answers(half, labels) == 0.5
    for wrong in ((labels + 1) % 10, torch.zeros_like(labels), torch.arange(100) // 10):
        with pytest.raises(DataError, match=r"where chance would be .*check that the classes are numbered"):
            check_answers(wrong, labels)


def test_answers_to_pictures_of_nearly_one_class() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    labels[:6] = 1
    mostly = labels.clone()
    mostly[:3] = 0
    assert check_answers(mostly, labels) == pytest.approx(0.97)
    with pytest.raises(DataError, match=r"right on 94.0% .* chance would be on 94.0%"):
        check_answers(torch.zeros_like(labels), labels)


@pytest.mark.parametrize("limit", ["100000", "max"])
def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr("mnp_fast.data._CONTAINER_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert _memory_limit() == (25000 if limit == "100000" else 1024000)


@pytest.mark.parametrize("train", [False, True])
def test_a_forward_that_is_bound_to_the_original_is_refused_and_changes_nothing(train: bool) -> None:
    class Held(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.call = lambda x: net(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    model = small_net().train(train)
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    for bound in (model, Held(small_net().train(train)).train(train)):
        before = {name: value.clone() for name, value in bound.state_dict().items()}
        with pytest.raises(ModelError, match="a copy of the model runs the original"):
            check_model(bound, DefenceSet(X, Y))
        assert all(torch.equal(value, before[name]) for name, value in bound.state_dict().items())
        assert bound.training == train


def test_a_hook_that_holds_a_part_of_the_model_is_refused() -> None:
    model, seen = small_net(), []
    first = model[0]
    handle = first.register_forward_hook(lambda module, args, output: output * first.weight.mean())
    with pytest.raises(ModelError, match="a hook on 0 is a function that holds a part of the model"):
        check_model(model, DefenceSet(X, Y))
    handle.remove()
    first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert check_model(model, DefenceSet(X, Y)) == 4


def test_complex_weights_are_refused() -> None:
    model = small_net()
    model.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))
    assert check_model(model, DefenceSet(X, Y)) == 4
    model.spectrum = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match="parameter spectrum is complex"):
        check_model(model, DefenceSet(X, Y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_any_precision_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(small_net(), nn.Softmax(1)).to(dtype)
    with pytest.raises(ModelError, match="remove its last softmax"):
        check_model(model, DefenceSet(X, Y))
