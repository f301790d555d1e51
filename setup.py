"""Builds the native part with CMake and packs it with the Python package. All metadata is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_CMAKE = (3, 25)
# Without PYTHONPATH and PYTHONNOUSERSITE, by which pip hides the packages of the environment that is installed into.
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def load_settings() -> ModuleType:
    """mnp_fast/settings.py by itself: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("mnp_fast_settings", ROOT / "mnp_fast" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def find_torch() -> Path:
    """Folder of the torch of the environment that is installed into, or of this process where that is another."""
    for flags in (["-EP"], []):
        found = subprocess.run([sys.executable, *flags, "-c", FIND_TORCH], capture_output=True, text=True, check=False)
        folder = found.stdout.strip()
        if found.returncode == 0 and folder:
            break
    else:
        raise SetupError(
            f"mnp_fast is built against the torch of your environment, and {sys.executable} has none: "
            "`pip install torch` first. With a build tool that makes an environment of its own (uv, build), turn its "
            "isolation off and install setuptools, cmake, ninja and pybind11 beside torch."
        )
    version: dict[str, str] = {}
    exec((Path(folder) / "version.py").read_text(), version)
    if tuple(int(part) for part in version["__version__"].split(".")[:2]) < OLDEST_TORCH:
        raise SetupError(f"mnp_fast needs torch 2.10 or newer; {folder} is {version['__version__']}")
    return Path(folder)


def find_tool(name: str, oldest: tuple[int, int] = (0, 1)) -> str:
    """Path of a program of the build, beside the interpreter or on PATH, that is new enough."""
    for place in (str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)):
        found = shutil.which(name, path=place)
        if found and version_of(found) >= oldest:
            return found
    newer = f" {oldest[0]}.{oldest[1]} or newer" if oldest[0] else ""
    raise SetupError(f"the build needs {name}{newer}: pip install cmake ninja")


def version_of(program: str) -> tuple[int, ...]:
    """Its first two numbers, as it says itself; (0, 0) where it does not."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:  # a script, of which the interpreter is gone
        said = ""
    found = re.search(r"(\d+)\.(\d+)", said)
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


class CMakeBuild(build_ext):
    """Runs CMake, which puts all libraries into the package: of the source folder if editable, else of the wheel."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise SetupError(f"mnp_fast is built and tested on Linux alone, and this is {sys.platform}")
        settings = load_settings()
        torch_folder = find_torch()
        editable = self.inplace or getattr(self, "editable_mode", False)
        output = (ROOT if editable else Path(self.build_lib).resolve()) / "mnp_fast"
        work = Path(self.build_temp).resolve() / "native"
        for directory in (output, work):
            directory.mkdir(parents=True, exist_ok=True)
        made = work / "lib"
        shutil.rmtree(made, ignore_errors=True)
        cmake, ninja = find_tool("cmake", OLDEST_CMAKE), find_tool("ninja")
        # Fresh, because the tools of an isolated build are gone, and their paths stale, at the next one.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)]
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMNP_TORCH_DIR={torch_folder}",
            f"-DMNP_OUTPUT_DIR={made}",
            f"-DMNP_VERSION={self.distribution.get_version()}",
            f"-DMNP_FAST_CUDA={settings.read('MNP_FAST_CUDA')}",
            f"-DMNP_FAST_CUDA_ARCHS={settings.read('MNP_FAST_CUDA_ARCHS')}",
        ]
        for command in (configure, [cmake, "--build", str(work)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SetupError(f"the native build failed ({error}); its own message is above") from None
        # Only now: what was there works until it is replaced. A library that is left out now must not stay behind.
        for stale in output.glob("libmnp_fast_*.so"):
            if not (made / stale.name).exists():
                stale.unlink()
        for library in made.glob("*.so"):
            # Beside the old one first, which a running process may have mapped: written over, it would change there.
            beside = output / f"{library.name}.new"
            shutil.copy2(library, beside)
            beside.replace(output / library.name)

    # CMake has put the libraries where they belong; setuptools has nothing to copy.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=find_packages(include=["mnp_fast", "mnp_fast.*"]),
    package_data={"": ["py.typed", "*.html"]},
    ext_modules=[Extension("mnp_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
