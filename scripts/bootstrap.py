"""Makes the environment that the Makefile's commands run in: a venv, its packages, and this package built into it.

    python3 scripts/bootstrap.py [--venv .venv] [--torch REQUIREMENT] [--no-build]

Needs Linux, Python 3.11 or newer with venv and headers, a C++ compiler and a package index; nothing else. What is up to
date is left alone: a second call does nothing. Without an NVIDIA GPU torch's CPU build is installed, and its CUDA
packages, several gigabytes, are never fetched.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
TORCH, TORCHVISION = "torch==2.13.0", "torchvision==0.28.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
APART = ("torch", "torchvision")
VERSION_OF_TORCH = "import importlib.metadata as m; print(m.version('torch'))"
LIBRARIES = ("_native*.so", "libmnp_fast_cpu.so")
VARIABLES = ("MNP_FAST_CUDA", "CXX", "CMAKE_", "CUDACXX", "CUDAFLAGS", "CUDA_PATH", "CUDA_HOME", "NVCC_", "LDFLAGS")
BUILT_FROM = ("setup.py", "CMakeLists.txt", "pyproject.toml", "csrc", "mnp_fast/settings.py")


def main() -> None:
    """Bring the environment up to date, or stop with one message that says what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is (default: .venv)")
    parser.add_argument("--torch", default="", help=f"another torch, e.g. torch==2.11.0 (default: {TORCH})")
    parser.add_argument("--no-build", action="store_true", help="install the packages only")
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        fail(
            f"this is Python {platform.python_version()}; {OLDEST[0]}.{OLDEST[1]} or newer is needed",
            "install one and name it: make PYTHON=python3.12 ...",
        )
    if sys.platform != "linux":
        fail(
            f"this is {platform.system()}; the kernels are built and tested on Linux alone", "use Linux, or a container"
        )
    if not args.no_build:
        check_compiler()
    venv = args.venv.resolve()
    # Of the environment, and of the tree that is built in; `make clean` leaves both locks alone.
    with locked(venv.with_name(f"{venv.name}.lock")), locked(ROOT / ".bootstrap.lock"):
        bring_up_to_date(venv, args.torch, built=not args.no_build)


def bring_up_to_date(venv: Path, torch: str, *, built: bool) -> None:
    """Make, install and build what is not there, or not of what it is made of now."""
    python = venv / "bin/python"
    make_venv(venv, python)
    packages = requirements()
    which = torch or f"without a GPU: {without_gpu()}"
    wanted = digest([Path(__file__).resolve()], [*packages, which, sys.version])
    with up_to_date(wanted, venv / "mnp_fast-packages.stamp") as done:
        if not done:
            install_packages(python, packages, torch)
    if not built:
        return
    # An editable build stands in this tree, for one environment at a time, and is installed into that: a stamp in each.
    wanted = digest(sources(), [wanted, str(ROOT), str(python), *toolchain()])
    with up_to_date(wanted, ROOT / "build" / "bootstrap.stamp", venv / "mnp_fast-build.stamp") as done:
        if not (done and all(any(ROOT.glob(f"mnp_fast/{name}")) for name in LIBRARIES)):
            build(python)


@contextmanager
def up_to_date(wanted: str, *stamps: Path) -> Iterator[bool]:
    """Whether all stamps say `wanted`; they do afterwards, unless what is done in between fails."""
    if all(stamp.exists() and stamp.read_text() == wanted for stamp in stamps):
        yield True
        return
    # Gone meanwhile: what failed half-way is not up to date, even once its sources are put back.
    for stamp in stamps:
        stamp.unlink(missing_ok=True)
    yield False
    for stamp in stamps:
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(wanted)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One at a time: two calls would write into one environment."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(file.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another call to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a folder that is read alone, where only what is up to date can be used, or one without locks
        yield


def make_venv(venv: Path, python: Path) -> None:
    """Create the venv where there is none that works."""
    if (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    ):
        there = ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")
        if there != f"{sys.version_info[0]}.{sys.version_info[1]}":
            fail(
                f"{venv} is of Python {there}, and this is {platform.python_version()}",
                f"name that one (make PYTHON=python{there} ...), another place (make VENV=...), or remove {venv}",
            )
        return
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        fail(
            "this Python comes without venv or ensurepip, so that no environment can be made",
            f"install them (Debian and Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv), "
            "or name another Python: make PYTHON=...",
        )
    say(f"creating {venv}")
    # --clear would empty whatever folder the caller named; only what is a venv already may be emptied.
    clear = ["--clear"] if (venv / "pyvenv.cfg").exists() else []
    if subprocess.run([sys.executable, "-m", "venv", *clear, venv], check=False).returncode != 0:
        fail(f"the environment {venv} cannot be made", "see the message above; is the folder writable?")


def install_packages(python: Path, packages: list[str], torch: str) -> None:
    """Install torch as this machine needs it, then everything else."""
    say("installing packages")
    done, again = False, []
    if torch or not without_gpu():
        # To pip a CPU build of the same version is what was asked for, and would stay. It goes once the other is there.
        if ask(python, VERSION_OF_TORCH).endswith("+cpu") and not torch.endswith("+cpu"):
            again = ["--force-reinstall"]
            replaced = pip(python, torch or TORCH, "--no-deps", *again)
            must(replaced, "torch cannot be replaced", "see pip's message above; is an index reachable?")
        must(
            pip(python, torch or TORCH), "torch cannot be installed", "see pip's message above; is an index reachable?"
        )
    else:
        places = install_cpu_torch(python)
        # Of the same build where there is one: torchvision's plain wheel does not import beside a torch without CUDA.
        done = pip(python, f"{TORCHVISION}+cpu", "--no-deps", *places, quiet=True)
    # torch is there already; with its own requirements torchvision might still bring another one.
    must(
        done or pip(python, torchvision_for(python), "--no-deps", *again),
        "torchvision cannot be installed",
        "see pip's message above",
    )
    must(pip(python, *packages), "the packages cannot be installed", "see pip's message above; is an index reachable?")


def torchvision_for(python: Path) -> str:
    """The torchvision that belongs to the installed torch: 0.(m + 15) is built for 2.m."""
    return f"torchvision==0.{int(ask(python, VERSION_OF_TORCH).split('.')[1]) + 15}.*"


def install_cpu_torch(python: Path) -> list[str]:
    """torch's CPU build, from the places that pip is set up for or else from its own index; pip's options for those."""
    wanted = f"{TORCH}+cpu"
    # One short try: where the index cannot be reached, pip's own patience would be minutes.
    elsewhere = ["--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "15"]
    found = next((places for places in ([], elsewhere) if pip(python, wanted, *places, quiet=not places)), None)
    if found is None:
        fail(
            f"{wanted} is neither in pip's own places nor at {CPU_INDEX}",
            "reach that index, or put the wheel into a folder and set PIP_FIND_LINKS to it; or, where several "
            f"gigabytes of CUDA packages do not matter, say: make TORCH={TORCH} ...",
        )
    return found


def check_compiler() -> None:
    """Stop, before anything is fetched, where the package could not be built."""
    if not any(shutil.which(name) for name in compilers()):
        fail(
            f"no C++ compiler was found ({', '.join(compilers())})",
            "install one (Debian and Ubuntu: apt install g++), or set CXX",
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        fail(
            "this Python comes without its headers, which the build needs",
            f"install them (Debian and Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev), "
            "or name another Python: make PYTHON=...",
        )


def compilers() -> list[str]:
    """Programs that may be the C++ compiler."""
    return [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]


def build(python: Path) -> None:
    """Build the package and install it, editable, into the environment."""
    say("building mnp_fast")
    done = pip(python, "--no-build-isolation", "--no-deps", "-e", str(ROOT))
    must(
        done,
        "mnp_fast cannot be built",
        "see the compiler's message above; where it is nvcc's, set MNP_FAST_CUDA=off to build without CUDA kernels",
    )


def without_gpu() -> bool:
    """Whether there is no NVIDIA GPU, so that pip's plain torch would bring CUDA packages for nothing."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return False
    # There without a card, too, on machines that share a driver's image.
    tool = shutil.which("nvidia-smi")
    try:
        # A broken driver may let it wait for ever.
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False, timeout=30) if tool else None
    except (OSError, subprocess.TimeoutExpired):
        return True
    return listed is None or "GPU 0" not in listed.stdout


def requirements() -> list[str]:
    """All that pyproject.toml names for building, running, testing and linting, but for what is installed apart."""
    # Not at the top: a Python too old for it is to be told so.
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)
    extras = content["project"]["optional-dependencies"]
    named = [
        *content["build-system"]["requires"],
        *content["project"]["dependencies"],
        *extras["test"],
        *extras["lint"],
    ]
    return sorted({item for item in named if name_of(item) not in APART})


def name_of(requirement: str) -> str:
    """The package's name in a requirement such as "torch>=2.10"."""
    end = next((i for i, letter in enumerate(requirement) if not (letter.isalnum() or letter in "-_.")), None)
    return requirement[:end]


def sources() -> list[Path]:
    """The files that the built package depends on."""
    places = [ROOT / name for name in BUILT_FROM]
    return sorted(f for place in places for f in ([place] if place.is_file() else place.rglob("*")) if f.is_file())


def toolchain() -> list[str]:
    """What decides how the package is built, beside its sources."""
    variables = sorted(name for name in os.environ if name.startswith(VARIABLES))
    # CMake finds CUDA there, too.
    roots = [root for name in ("CUDA_PATH", "CUDA_HOME") if (root := os.environ.get(name))]
    path = [*(f"{root}/bin" for root in roots), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    names = (*compilers(), os.environ.get("CUDACXX") or "nvcc")
    found = [program for name in names if (program := shutil.which(name, path=os.pathsep.join(path)))]
    return [*(f"{name}={os.environ[name]}" for name in variables), *map(os.path.realpath, found), *map(version, found)]


def version(program: str) -> str:
    """What a program says of itself; nothing where it does not run."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def digest(files: Iterable[Path], words: Iterable[str]) -> str:
    """One value that changes where any file or word does."""
    value = hashlib.sha256("\0".join(words).encode())
    for file in files:
        value.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return value.hexdigest()


def ask(python: Path, code: str) -> str:
    """What `code` prints in the environment; nothing where it fails."""
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def pip(python: Path, *words: str, quiet: bool = False) -> bool:
    """Run pip install with `words` in the environment; whether it succeeded. quiet: say nothing of a failure."""
    # cmake and ninja come as packages: the build finds them by the path.
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"}
    call = [str(python), "-m", "pip", "install", "--quiet", *words]
    errors = subprocess.DEVNULL if quiet else None
    return subprocess.run(call, env=environment, cwd=ROOT, stderr=errors, check=False).returncode == 0


def must(done: bool, problem: str, remedy: str) -> None:
    """Stop with a message where something was not done."""
    if not done:
        fail(problem, remedy)


def say(text: str) -> None:
    """Tell what is being done."""
    print(f"bootstrap: {text}", flush=True)


def fail(problem: str, remedy: str) -> NoReturn:
    """Stop with a message."""
    sys.exit(f"bootstrap: {problem}; {remedy}")


if __name__ == "__main__":
    main()
