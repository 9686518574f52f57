"""Drives CMakeLists.txt, the one description of the native build. Imports no torch.

Environment:
    LVLM_FASTXAI_NO_EXT=1        build nothing native: pure Python, no compiler needed
    LVLM_FASTXAI_TORCH_DIR       folder of the torch package to build against, when it is not beside this interpreter
    LVLM_FASTXAI_CUDA            ON: CUDA kernels or fail · OFF: none · AUTO (default): when nvcc is found
    LVLM_FASTXAI_CUDA_ARCHS      architectures, such as "80;90" (default: every supported one)
    CMAKE_BUILD_PARALLEL_LEVEL   compiler processes at a time
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


def find_torch() -> Path | None:
    """The torch package to build against, found without importing it.

    Build isolation hides site-packages from `sys.path` but leaves the interpreter's prefix, so the folder that the
    result will be installed into is looked at as well.
    """
    named = os.environ.get("LVLM_FASTXAI_TORCH_DIR")
    if named:
        return Path(named).resolve()
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for scheme in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "version.py").exists():
            return folder
    return None


def reason_for_pure_python(torch: Path | None) -> str | None:
    """Why nothing native can be built, or None when it can."""
    if torch is None:
        return "no torch is installed beside this interpreter; install it first or set LVLM_FASTXAI_TORCH_DIR"
    version_file = torch / "version.py"
    if not version_file.exists():
        return f"{torch} is not a torch package"
    found = re.search(r"__version__\s*=\s*'(\d+)\.(\d+)", version_file.read_text())
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        return f"the torch in {torch} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    return None


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, into the wheel's tree or in place."""

    def run(self) -> None:
        torch = find_torch()
        reason = reason_for_pure_python(torch)
        if reason is not None:
            rule = "*" * 100
            print(
                f"{rule}\nlvlm_fastxai is built WITHOUT its native kernels: {reason}.\n"
                f"Everything works, slowly, on the dense reference.\n{rule}",
                file=sys.stderr,
            )
            return
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on PATH; install it, or set LVLM_FASTXAI_NO_EXT=1 for pure Python")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DFASTXAI_TORCH_DIR={torch}",
            f"-DFASTXAI_VERSION={self.distribution.get_version()}",
            f"-DFASTXAI_CUDA={os.environ.get('LVLM_FASTXAI_CUDA', 'AUTO')}",
            f"-DFASTXAI_CUDA_ARCHITECTURES={os.environ.get('LVLM_FASTXAI_CUDA_ARCHS', '')}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 is not None and pybind11.origin is not None:
            configure.append(f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}")
        for command in (
            configure,
            [cmake, "--build", str(build)],
            [cmake, "--install", str(build), "--prefix", str(target), "--strip"],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    "the native build failed; LVLM_FASTXAI_NO_EXT=1 installs the package in pure Python"
                ) from error

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "lvlm_fastxai"
        return [str(path) for path in folder.glob("*.so")]


without_extension = os.environ.get("LVLM_FASTXAI_NO_EXT", "0") not in ("", "0")
packages = find_packages(include=["lvlm_fastxai", "lvlm_fastxai.*"])
package_dir = {}
if (ROOT / "triton_kernels").is_dir():
    # Installed inside the package, so that no other project's top-level `triton_kernels` is shadowed.
    packages.append("lvlm_fastxai.triton_kernels")
    package_dir["lvlm_fastxai.triton_kernels"] = "triton_kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[] if without_extension else [Extension("lvlm_fastxai._build_info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
