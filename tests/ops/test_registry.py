"""Choice of a backend: forced fails loudly, automatic falls back, and import looks for nothing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

from mnp_fast import settings
from mnp_fast.errors import BackendError, ConfigError
from mnp_fast.ops import available, force_backend, force_cpu_isa, masked_affine, native, registry, why_not

CPU = torch.device("cpu")
BUILT = native.info_module() is not None


def call(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return masked_affine(torch.ones(2, 3, 4, dtype=dtype), *[torch.ones(3)] * 4)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("cpu", torch.float16, "float32 and bfloat16 kernels, not torch.float16"),
        ("cuda", torch.float32, "runs on CUDA devices, not on cpu"),
        ("triton", torch.float64, "float32, bfloat16 and float16 kernels"),
    ],
)
def test_forced_and_impossible_is_an_error(backend, dtype, reason):
    vectors = [torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)] * 4
    with force_backend(backend), pytest.raises(BackendError, match=reason):
        masked_affine(torch.ones(2, 3, 4, dtype=dtype), *vectors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_backends_say_what_is_missing():
    for backend in ("cuda", "triton"):
        assert "CUDA" in why_not(backend, "masked_affine", torch.device("cuda"), torch.float32)


def test_automatic_falls_back_to_the_reference():
    assert available("masked_affine", CPU, torch.float16) == ["reference"]
    assert call(torch.float16).dtype == torch.float16


def test_automatic_takes_the_cpu_kernels():
    if not BUILT:
        pytest.skip("the native part is not built")
    assert available("masked_affine", CPU, torch.bfloat16)[0] == "cpu"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Libraries and backends are looked for anew, also after the test."""
    kept = (native.load, native.info_module, registry._kernel)
    monkeypatch.setattr(native, "_unusable", {})
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_unbuilt_library_is_diagnosed_and_falls_back(monkeypatch, tmp_path, unloaded):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call().shape == (2, 3, 4)
    with force_backend("cpu"), pytest.raises(BackendError, match="not built"):
        call()


def falls_back_with_a_warning(what: str) -> None:
    told = rf"{what} is built from another version of the sources: rebuild with `pip install"
    with pytest.warns(RuntimeWarning, match=told) as warned:
        assert torch.equal(call(), torch.ones(2, 3, 4))
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    with force_backend("cpu"), pytest.raises(BackendError, match=told):
        call()


def test_library_that_does_not_load_is_told_of(monkeypatch, tmp_path, unloaded):
    (tmp_path / "libmnp_fast_cpu.so").write_text("not a library")
    monkeypatch.setattr(native, "info_problem", lambda: None)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"libmnp_fast_cpu.so cannot be loaded \(.*\): rebuild with `pip install"):
        assert torch.equal(call(), torch.ones(2, 3, 4))


def test_native_module_that_does_not_load_is_told_of(monkeypatch, unloaded):
    def broken(name):
        raise ImportError("version `GLIBCXX_9' not found")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    assert native.info_module() is None
    assert "cannot be loaded (version `GLIBCXX_9' not found): rebuild" in native.info_problem()
    assert native.unusable() == [native.info_problem()]


@pytest.mark.skipif(not BUILT, reason="the native part is not built")
def test_library_of_another_version(monkeypatch, unloaded):
    monkeypatch.setitem(native.INTERFACES, "mnp_fast_cpu", "of today")
    falls_back_with_a_warning("libmnp_fast_cpu.so")


@pytest.mark.parametrize("lacks", ["isa_code", "cuda_reason"])
def test_native_module_of_another_version(monkeypatch, unloaded, lacks):
    older = types.ModuleType("mnp_fast._native")
    info = dict.fromkeys(native._ENTRIES, "")
    info.pop(lacks, None)
    parts = {"build_info": lambda: info, "usable_isas": lambda: ["scalar"], "isa_code": lambda name: 0}
    parts.pop(lacks, None)
    older.__dict__.update(parts)
    find = importlib.import_module
    monkeypatch.setattr(
        native.importlib, "import_module", lambda name: older if name == "mnp_fast._native" else find(name)
    )
    falls_back_with_a_warning("mnp_fast._native")


def test_the_digest_is_of_names_arguments_and_results():
    now = ["a(Tensor x, int n) -> Tensor", "b() -> ()"]
    longer, renamed = "a(Tensor x, int n) -> (Tensor, Tensor)", "b(int n) -> ()"
    others = [now[:1], [*now, "c() -> ()"], [now[0], renamed], [longer, now[1]]]
    digests = [native.digest(torch._C.parse_schema(f"library::{text}") for text in texts) for texts in (now, *others)]
    assert len(set(digests)) == 1 + len(others)
    assert native.digest(torch._C.parse_schema(text) for text in reversed(now)) == digests[0]


def test_force_backend_ends_with_its_block():
    with pytest.raises(ConfigError, match="does not exist"), force_backend("fastest"):
        pass
    with force_backend("cuda"), force_backend("reference"):
        call()
    call()


@pytest.mark.skipif(not BUILT, reason="the native part is not built")
def test_forced_instruction_set_that_is_not_there():
    with force_cpu_isa("avx1024"), force_backend("cpu"), pytest.raises(BackendError, match="this processor runs"):
        call()


def test_environment_forces_backend_and_instruction_set():
    code = (
        "import torch; from mnp_fast.ops import masked_affine;"
        "masked_affine(torch.ones(2, 3), *[torch.ones(3)] * 4); print('ran')"
    )
    asked = "from mnp_fast.ops import registry; print(registry.requested_cpu_isa());"
    done = run_python(asked + code, MNP_FAST_BACKEND="reference", MNP_FAST_CPU_ISA="scalar")
    assert done.stdout.split() == ["scalar", "ran"], done.stderr
    assert "BackendError" in run_python(code, MNP_FAST_BACKEND="cuda").stderr
    wrong = run_python(code, MNP_FAST_BACKEND="fast")
    assert "ConfigError" in wrong.stderr
    assert "auto, reference, cpu, triton, cuda" in wrong.stderr


@pytest.mark.parametrize("content", ["", "raise RuntimeError('broken')"])
def test_a_triton_that_is_broken_or_old_disables_nothing(tmp_path, content):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content)
    code = (
        "import sys, torch; from mnp_fast.ops import masked_affine, why_not\n"
        "masked_affine(torch.ones(2, 3), *[torch.ones(3)] * 4)\n"
        "assert 'triton' not in sys.modules\n"
        "print(why_not('triton', 'masked_affine', torch.device('cpu'), torch.float32))"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    done = run_python(code, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    assert "triton cannot be imported" in done.stdout, done.stderr


@pytest.mark.parametrize("tracked", [False, True])
def test_forward_mode_is_refused(tracked):
    x, ones = torch.rand(2, 3, requires_grad=tracked), torch.ones(2, 3)
    vectors = [torch.ones(3)] * 4
    with pytest.raises(BackendError, match="no forward-mode derivative"):
        torch.func.jvp(lambda t: masked_affine(t, *vectors), (x.detach(),), (ones,))
    with forward_ad.dual_level():
        assert torch.equal(masked_affine(x, *vectors), x)
        with pytest.raises(BackendError, match="no forward-mode derivative"):
            masked_affine(forward_ad.make_dual(x, ones), *vectors)


def test_import_looks_for_nothing():
    code = (
        "import sys, torch, mnp_fast.ops\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules, 'triton'\n"
        "assert 'mnp_fast._native' not in sys.modules, 'native'\n"
        "assert not any('libmnp_fast' in str(path) for path in torch.ops.loaded_libraries)\n"
    )
    done = run_python(code, MNP_FAST_BACKEND="nonsense")
    assert done.returncode == 0, done.stderr


def test_settings_are_documented_and_checked():
    assert all(v.meaning and (not v.choices or v.default in v.choices) for v in settings.VARIABLES.values())
    assert settings.read("MNP_FAST_CUDA", {}) == "auto"
    assert settings.read("MNP_FAST_CUDA", {"MNP_FAST_CUDA": " OFF "}) == "off"
    with pytest.raises(ValueError, match="MNP_FAST_CUDA='maybe': must be one of auto, on, off"):
        settings.read("MNP_FAST_CUDA", {"MNP_FAST_CUDA": "maybe"})
    assert any("INVALID" in value for _, value, _ in settings.describe({"MNP_FAST_BACKEND": "x"}))
