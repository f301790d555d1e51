"""What the build must keep to: one torch, portable code, nothing dropped in silence. No compiler runs here."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mnp_fast import settings
from mnp_fast.ops import force_backend, force_cpu_isa, masked_affine, native, why_not
from mnp_fast.ops.cpu_backend import usable_isas

ROOT = Path(__file__).resolve().parents[1]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
LIBRARIES = sorted((ROOT / "mnp_fast").glob("*.so"))
BUILT = pytest.mark.skipif(native.info_module() is None, reason="the native part is not built")


def ops_of_the_build() -> set[str]:
    return set(re.search(r"set\(OPS ([^)]*)\)", CMAKE)[1].split())


def ops_of_the_cpu_alone():
    return set(re.search(r"set\(CPU_OPS ([^)]*)\)", CMAKE)[1].split())


def test_every_op_has_every_layer():
    for op in ops_of_the_build():
        for file in ("cpu/{}.cpp", "cpu/{}.h", "cuda/{}.cu", "cuda/{}.h", "torch/{}.cpp", "torch/{}_cuda.cpp"):
            assert (ROOT / "csrc" / file.format(op)).exists(), file.format(op)
        assert (ROOT / "mnp_fast" / "ops" / f"op_{op}.py").exists()
        assert (ROOT / "mnp_fast" / "ops" / f"triton_{op}.py").exists()
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


def test_ops_of_the_cpu_alone_have_its_layers():
    for op in ops_of_the_cpu_alone():
        for file in ("cpu/{}.cpp", "cpu/{}.h", "torch/{}.cpp"):
            assert (ROOT / "csrc" / file.format(op)).exists(), file.format(op)
        assert (ROOT / "mnp_fast" / "ops" / f"{op}.py").exists()
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


def test_kernels_know_nothing_of_torch():
    for source in [*(ROOT / "csrc" / "cpu").iterdir(), *(ROOT / "csrc" / "cuda").iterdir()]:
        included = re.findall(r'#include [<"]([^>"]+)', source.read_text())
        assert not [name for name in included if name.startswith(("torch", "ATen", "c10"))], source


def test_glue_uses_the_stable_interface_alone():
    for source in (ROOT / "csrc" / "torch").iterdir():
        included = re.findall(r"#include <((?:torch|ATen|c10)[^>]+)", source.read_text())
        allowed = ("torch/csrc/stable/", "torch/headeronly/")
        assert all(name.startswith(allowed) for name in included), source


def test_kernel_files_share_no_inline_function():
    # The linker would keep one copy, maybe of an instruction set that the processor lacks.
    folder = ROOT / "csrc" / "cpu"
    for source in [*folder.glob("*.h"), *(folder / f"{op}.cpp" for op in ops_of_the_build() | ops_of_the_cpu_alone())]:
        included = set(re.findall(r"#include <([^>]+)>", source.read_text()))
        assert included <= {"cstdint", "cstring", "immintrin.h"}, source


@pytest.mark.parametrize(("library", "suffix"), [("mnp_fast_cpu", ""), ("mnp_fast_cuda", "_cuda")])
def test_the_interface_is_that_of_the_sources(library, suffix):
    schemas = []
    for op in ops_of_the_build() | (set() if suffix else ops_of_the_cpu_alone()):
        source = (ROOT / "csrc" / "torch" / f"{op}{suffix}.cpp").read_text()
        for definition in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source):
            schemas.append(torch._C.parse_schema(f"{library}::" + "".join(re.findall(r'"([^"]*)"', definition))))
    assert len(schemas) >= len(ops_of_the_build())
    found = native.digest(schemas)
    assert native.INTERFACES[library] == found, f"mnp_fast/ops/native.py: INTERFACES[{library!r}] = {found!r}"


@BUILT
def test_build_information_is_complete():
    info = native.build_info()
    assert info["compiler"]
    assert info["torch"].split(".")[0].isdigit()
    assert "scalar" in info["cpu_isas"].split()
    assert bool(info["cuda"]) != bool(info["cuda_reason"])
    assert bool(info["cuda"]) == (ROOT / "mnp_fast" / "libmnp_fast_cuda.so").exists() or not LIBRARIES


@pytest.mark.skipif(not LIBRARIES or not shutil.which("readelf"), reason="needs libraries in place, and readelf")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_name_no_path_and_no_cuda(library):
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    needed = re.findall(r"NEEDED.*\[(.*?)\]", text)
    assert not [name for name in needed if "cuda" in name or "python" in name], needed


def run_setup(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code after setup.py's definitions, with its setup() call taken out."""
    prelude = "import setuptools; setuptools.setup = lambda **_: None\n"
    prelude += f"__file__ = {str(ROOT / 'setup.py')!r}\nexec(compile(open(__file__).read(), __file__, 'exec'))\n"
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)


def test_setup_finds_the_torch_that_is_used():
    done = run_setup(code="print(find_torch())")
    assert done.stdout.strip() == str(Path(torch.__file__).parent), done.stderr


@pytest.mark.parametrize("version", [None, "2.9.1+cu128"])
def test_setup_says_what_to_do_without_a_torch(version, tmp_path):
    if version:
        (tmp_path / "version.py").write_text(f"__version__ = {version!r}\n")
    finder = f"print({str(tmp_path) if version else ''!r})"
    code = f"FIND_TORCH = {finder!r}\nfind_torch()"
    done = run_setup(code=code)
    assert done.returncode != 0
    assert ("needs torch 2.10 or newer" if version else "pip install torch") in done.stderr


def test_setup_finds_its_tools_beside_the_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = run_setup(code="print(find_tool('ninja'))")
    assert Path(done.stdout.strip()).parent == Path(sys.executable).parent, done.stderr
    assert "the build needs nonesuch: pip install" in run_setup(code="find_tool('nonesuch')").stderr


def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bootstrap_says_what_is_missing_before_anything_is_fetched(monkeypatch, tmp_path):
    script = bootstrap()
    script.check_compiler()
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="without its headers"):
        script.check_compiler()
    monkeypatch.setenv("CXX", "nonesuch")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found \(nonesuch\)"):
        script.check_compiler()


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """(bootstrap in a tree of its own, what it does): "packages" and "build", which only note that they were called."""
    script = bootstrap()
    done = []
    libraries = tmp_path / "mnp_fast"

    def build(_):
        done.append("build")
        libraries.mkdir(exist_ok=True)
        for name in script.LIBRARIES:
            (libraries / name.replace("*", "")).touch()

    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "make_venv", lambda venv, _: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(script, "install_packages", lambda *_: done.append("packages"))
    monkeypatch.setattr(script, "build", build)
    monkeypatch.setattr(script, "check_compiler", lambda: None)
    monkeypatch.setattr(script, "requirements", list)
    monkeypatch.setattr(script, "digest", lambda files, words: "\n".join(words))
    monkeypatch.setattr(script, "toolchain", list)
    monkeypatch.setattr(script, "sources", list)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--venv", str(tmp_path / "venv")])

    def run():
        done.clear()
        script.main()
        return list(done)

    return script, run


def test_what_is_up_to_date_is_left_alone(calls, tmp_path, monkeypatch):
    script, run = calls
    assert run() == ["packages", "build"]
    assert run() == []
    monkeypatch.setattr(script, "toolchain", lambda: ["another compiler"])
    assert run() == ["build"]
    monkeypatch.setattr(script, "without_gpu", lambda: "a card has come")
    assert run() == ["packages", "build"]
    (tmp_path / "mnp_fast" / "libmnp_fast_cpu.so").unlink()
    assert run() == ["build"]
    # An environment made anew at the same place has neither packages nor the editable install.
    shutil.rmtree(tmp_path / "venv")
    assert run() == ["packages", "build"]
    assert run() == []


@pytest.mark.parametrize(("step", "again"), [("build", ["build"]), ("install_packages", ["packages"])])
def test_what_failed_is_tried_again_though_all_is_put_back(calls, monkeypatch, step, again):
    script, run = calls
    run()
    with monkeypatch.context() as patch:
        patch.setattr(script, step, lambda *_: sys.exit(1))
        patch.setattr(script, "requirements" if step == "install_packages" else "toolchain", lambda: ["broken"])
        with pytest.raises(SystemExit):
            run()
    assert run() == again


def test_one_call_at_a_time(tmp_path):
    script = bootstrap()
    file = tmp_path / "lock"
    with script.locked(file), file.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with script.locked(tmp_path / "nowhere" / "lock"):  # that cannot be written: what is up to date can be used
        pass


def test_the_toolchain_is_what_it_says_of_itself(monkeypatch, tmp_path):
    script = bootstrap()
    compiler = tmp_path / "c++"
    monkeypatch.setenv("CXX", str(compiler))
    found = []
    for said in ("12.2", "13.1"):
        compiler.write_text(f"#!/bin/sh\necho {said}\n")
        compiler.chmod(0o755)
        found.append(script.toolchain())
    assert found[0] != found[1]
    compiler.write_text("#!/gone/interpreter\n")
    assert script.version(str(compiler)) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert not [word for word in script.toolchain() if "VISIBLE" in word]


def test_an_environment_of_another_python_is_not_taken_for_this_one(monkeypatch, tmp_path):
    script = bootstrap()
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(script, "say", lambda text: pytest.fail(f"not left alone: {text}"))
    script.make_venv(tmp_path, python)
    monkeypatch.setattr(script.sys, "version_info", (3, 99, 0))
    with pytest.raises(SystemExit, match=r"is of Python 3\.\d+, and this is"):
        script.make_venv(tmp_path, python)


@pytest.mark.parametrize(
    ("said", "without"), [("GPU 0: NVIDIA H100 (UUID: GPU-1)", False), ("No devices were found", True), (None, True)]
)
def test_a_gpu_is_one_that_the_driver_lists(monkeypatch, tmp_path, said, without):
    script = bootstrap()
    monkeypatch.setattr(script.glob, "glob", lambda _: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    if said:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
    assert script.without_gpu() == without


def test_a_tool_that_is_too_old_is_passed_over(monkeypatch, tmp_path):
    tool = tmp_path / "ninja"
    tool.write_text("#!/bin/sh\necho 99.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_setup(code="print(find_tool('ninja', (99, 0)))").stdout.strip() == str(tool)
    assert "the build needs ninja 99.2 or newer" in run_setup(code="find_tool('ninja', (99, 2))").stderr


def test_setup_reads_the_settings_of_the_package():
    done = run_setup(code="s = load_settings(); print(*s.VARIABLES)")
    assert done.stdout.split() == list(settings.VARIABLES), done.stderr


def test_defaults_of_cmake_are_those_of_the_settings():
    for name in ("MNP_FAST_CUDA", "MNP_FAST_CUDA_ARCHS"):
        assert re.search(rf'set\({name} "([^"]*)"', CMAKE)[1] == settings.VARIABLES[name].default
    assert "-march=native" not in CMAKE


def test_no_check_is_left_out_where_all_are_asked_for() -> None:
    """As .ci/run does: tests are skipped where a tool or library is not there, which there would hide a bad build."""
    if os.environ.get("NO_CHECK_LEFT_OUT"):
        assert native.info_module() is not None
        for op in ops_of_the_build():
            assert why_not("cpu", op, torch.device("cpu"), torch.bfloat16) is None
        assert os.environ.get("CUDACXX") or shutil.which("nvcc")
        assert shutil.which("readelf")
        assert importlib.util.find_spec("triton")


@BUILT
def test_usable_instruction_sets_are_those_of_the_processor():
    """By what the system says of it: the tests of all kernels run on the sets that this list names."""
    listed = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    flags = set(listed[1].split()) if listed else set()  # no such line: not x86, where there is the scalar set alone
    needed = {"scalar": set(), "avx2": {"avx2", "fma"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16"}
    built = native.build_info()["cpu_isas"].split()
    assert usable_isas() == [isa for isa in built if needed[isa] <= flags]


@BUILT
def test_a_forced_instruction_set_is_what_runs():
    """Fused products round once and others twice: over many numbers scalar and wider kernels differ in some bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 4096, generator=generator)
    vectors = [torch.rand(64, generator=generator) for _ in range(4)]
    found = {}
    for isa in usable_isas():
        with force_backend("cpu"), force_cpu_isa(isa):
            found[isa] = masked_affine(x, *vectors)
    assert all(not torch.equal(found["scalar"], y) for isa, y in found.items() if isa != "scalar")
