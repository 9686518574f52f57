"""The native build: what it needs, what it links to, and kernels that this machine cannot run otherwise."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.commands import compiler, run

from lvlm_fastxai import _native, info

ROOT = Path(__file__).resolve().parents[1]
NATIVE_SOURCES = Path(__file__).with_name("native")
native = pytest.mark.skipif(_native.load() is not None, reason=f"native library: {_native.load()}")


def copy_of_sources(target: Path) -> Path:
    """The tree as an sdist would hold it, without what was built in place."""
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "weights")
    for name in ("csrc", "lvlm_fastxai", "triton_kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=skipped)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def add_the_toy_operator(sources: Path) -> None:
    """Its own files, and its line in the list: nothing else."""
    toy = Path(__file__).with_name("toy_operator")
    for room in ("ops", "reference"):
        shutil.copytree(toy / room, sources / "lvlm_fastxai" / room, dirs_exist_ok=True)
    shutil.copytree(toy / "csrc", sources / "csrc", dirs_exist_ok=True)
    with (sources / "lvlm_fastxai" / "ops" / "_operators.py").open("a") as file:
        file.write("from lvlm_fastxai.ops.softplus_product import softplus_product as softplus_product\n")


def test_setup_imports_no_torch() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "setuptools" in imported
    assert "torch" not in imported and "pybind11" not in imported


@native
def test_library_keeps_to_the_stable_abi() -> None:
    """Nothing of torch is linked but its C shim, and of CUDA nothing at all, so it loads beside any torch."""
    path = _native.library_path()
    assert path is not None
    listing = run([compiler("nm"), "-D", "--undefined-only", path]).stdout
    symbols = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.search(r"c10|2at|5torch|^cu|^cuda", symbol)]
    needed = run([compiler("readelf"), "-d", path]).stdout
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"cudart|libcuda|libtorch_cuda|libtorch_python|RPATH|RUNPATH", needed)


@native
def test_no_kernel_for_one_instruction_set_leaks_into_another() -> None:
    """The object files that are compiled with AVX flags export their entry table and nothing else."""
    objects = [
        path
        for path in (ROOT / "build").glob("cmake-*/CMakeFiles/kernel_*.dir/csrc/cpu/*.o")
        if sys.implementation.cache_tag in str(path)
    ]
    if not objects:
        pytest.skip("the build folder is not here")
    for path in objects:
        listing = run([compiler("nm"), "--defined-only", "--extern-only", path]).stdout
        operator = path.name.removesuffix("_kernel.cpp.o")
        (exported,) = [line.split()[-1] for line in listing.splitlines() if " V " not in line]
        assert f"{operator}_" in exported
        assert not re.search(r" [Wu] ", listing)


@native
def test_info_reports_the_build() -> None:
    report = info.collect()
    assert report["native"]["reason"] is None
    assert report["native"]["build"]["stable_abi"] == "2.11"
    assert "baseline" in report["native"]["build"]["cpu_instruction_sets"]
    assert report["operators"]["relevancy_product"]["cpu"] is None
    text = info.format_text(report)
    assert "relevancy_product" in text and "usable" in text


@pytest.mark.build
def test_isolated_build_without_nvcc_makes_the_cpu_kernels(tmp_path: Path) -> None:
    """As pip isolates it: site-packages hidden from the import path, torch still found beside the interpreter."""
    compiler("g++", "clang++")
    compiler("ninja")
    sources = copy_of_sources(tmp_path / "sources")
    add_the_toy_operator(sources)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    site_packages = Path(torch.__file__).parents[1]
    for name in ("setuptools", "pybind11", "cmake", "ninja"):
        for path in site_packages.glob(f"{name}*"):
            (overlay / path.name).symlink_to(path)
    if not (overlay / "pybind11").exists():
        pytest.skip("pybind11 is not installed")
    (overlay / "sitecustomize.py").write_text(
        f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(site_packages)!r}]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(overlay), "LVLM_FASTXAI_CUDA": "OFF"}
    environment.pop("LVLM_FASTXAI_NO_EXT", None)
    hidden = subprocess.run([sys.executable, "-c", "import torch"], env=environment, cwd=sources, capture_output=True)
    assert hidden.returncode != 0
    run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=sources, env=environment)
    assert (sources / "lvlm_fastxai" / "_C.so").exists()
    code = (
        "from lvlm_fastxai import _native, ops\n"
        f"assert str(_native.library_path()).startswith({str(sources)!r})\n"
        "assert _native.build_info()['cuda_architectures'] == ()\n"
        "assert ops.backends('relevancy_product')['cpu'] is None\n"
        "assert 'not built with CUDA' in ops.backends('relevancy_product')['cuda']\n"
        "import torch\n"
        "rows, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3)\n"
        "found = [ops.softplus_product(rows, weight, backend=name) for name in ('cpu', 'reference')]\n"
        "torch.testing.assert_close(*found)\n"
        "torch.testing.assert_close(*(torch.autograd.grad(one.sum(), rows) for one in found))\n"
    )
    run([sys.executable, "-c", code], cwd=sources, env={**os.environ, "PYTHONPATH": str(sources)})


@pytest.mark.build
def test_pure_python_wheel_needs_no_compiler(tmp_path: Path) -> None:
    sources = copy_of_sources(tmp_path / "sources")
    environment = {**os.environ, "LVLM_FASTXAI_NO_EXT": "1", "PATH": str(tmp_path)}
    run([sys.executable, "setup.py", "bdist_wheel"], cwd=sources, env=environment)
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lvlm_fastxai/ops/relevancy_product.py" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu")) or name.startswith("tests")]


@pytest.mark.build
def test_without_torch_the_build_warns_and_is_pure_python(tmp_path: Path) -> None:
    sources = copy_of_sources(tmp_path / "sources")
    environment = {**os.environ, "LVLM_FASTXAI_TORCH_DIR": str(tmp_path)}
    environment.pop("LVLM_FASTXAI_NO_EXT", None)
    finished = run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=sources, env=environment)
    assert "WITHOUT its native kernels" in finished.stdout + finished.stderr
    assert not list((sources / "lvlm_fastxai").glob("*.so"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_on_aarch64(dtype: str, tmp_path: Path) -> None:
    """The same source with NEON vectors, cross-compiled and emulated: Jetson's processor."""
    cross, emulator = compiler("aarch64-linux-gnu-g++"), compiler("qemu-aarch64-static", "qemu-aarch64")
    program = tmp_path / "kernel_alone"
    shape = ("-DFASTXAI_ISA=baseline", "-DFASTXAI_VECTOR_BYTES=16", "-DFASTXAI_TILE_ROWS=8", "-DFASTXAI_TILE_VECTORS=3")
    sources = (NATIVE_SOURCES / "kernel_alone.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp")))
    run([cross, "-std=gnu++17", "-O3", "-ffp-contract=fast", "-static", *shape, *sources, "-o", program])
    product, product_of_backward, gradients = map(float, run([emulator, program, dtype]).stdout.split())
    assert product <= 1e-6 and product_of_backward <= 1e-6
    assert gradients <= (1e-6 if dtype == "float32" else 2**-9)  # bfloat16's rounding
