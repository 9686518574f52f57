"""The native build: what it needs, what it links to, and kernels that this machine cannot run otherwise."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lvlm_fastxai import _native, info
from lvlm_fastxai.ops import key_ranges
from lvlm_fastxai.reference import relevancy_product as dense

ROOT = Path(__file__).resolve().parents[1]
NATIVE_SOURCES = Path(__file__).with_name("native")
native = pytest.mark.skipif(_native.load() is not None, reason=f"native library: {_native.load()}")


def compiler(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"none of {', '.join(names)} is installed")


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished


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
        assert [line.split()[-1] for line in listing.splitlines() if " V " not in line] == [
            next(line.split()[-1] for line in listing.splitlines() if "relevancy_product_" in line)
        ]
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


@pytest.fixture(scope="module")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda_on_host") / "cuda_on_host.so"
    source = NATIVE_SOURCES / "cuda_on_host.cpp"
    run([compiler("g++", "clang++"), "-std=c++17", "-O2", "-fPIC", "-shared", source, "-o", library])
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared_gradient", [False, True])
def test_cuda_kernels_on_the_host(dtype: torch.dtype, shared_gradient: bool, cuda_on_host: ctypes.CDLL) -> None:
    """The body of the CUDA kernels, thread by thread, against the twin: what can be proven without a GPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, targets, heads, key_heads, queries, keys, width = 2, 3, 4, 2, 37, 150, 20
    gradients = 1 if shared_gradient else targets
    query, key, value = (
        normal(batch, heads, queries, width),
        normal(batch, key_heads, keys, width),
        normal(batch, key_heads, keys, width),
    )
    grad_output = normal(batch, gradients, heads, queries, width)
    grad_output[..., ::2] *= 2.0**-20  # subnormal in float16
    row = torch.rand(batch, targets, queries, generator=generator)
    row[:, 0, 5:9] = 0
    row[:, :, 20] = 0
    query[:, :, 20] = torch.nan
    ranges = key_ranges(batch, queries, keys, window=100, lengths=torch.tensor([[3, 150], [0, 140]]))
    start, end = (t.contiguous() for t in ranges.unbind(-1))
    logsumexp = torch.randn(batch, heads, queries, generator=generator) + 4

    partial = torch.zeros(batch, heads, targets, keys)
    result = torch.full((batch, targets, keys), torch.nan)
    elements = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    sizes = (ctypes.c_int64 * 8)(batch, targets, gradients, heads, key_heads, queries, keys, width)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (query, key, value, grad_output, logsumexp, row, start, end)]
    cuda_on_host.relevancy_product(
        elements[dtype],
        *pointers,
        sizes,
        ctypes.c_float(0.25),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
    )
    truth = dense(*(t.double() for t in (query, key, value, grad_output, logsumexp, row)), start, end, 0.25)
    assert truth.abs().sum() > 0
    assert ((result - truth).abs().sum() / truth.abs().sum()).item() <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_on_aarch64(dtype: str, tmp_path: Path) -> None:
    """The same source with NEON vectors, cross-compiled and emulated: Jetson's processor."""
    cross, emulator = compiler("aarch64-linux-gnu-g++"), compiler("qemu-aarch64-static", "qemu-aarch64")
    program = tmp_path / "kernel_alone"
    shape = ("-DFASTXAI_ISA=baseline", "-DFASTXAI_VECTOR_BYTES=16", "-DFASTXAI_TILE_ROWS=8", "-DFASTXAI_TILE_VECTORS=3")
    sources = (NATIVE_SOURCES / "kernel_alone.cpp", ROOT / "csrc" / "cpu" / "relevancy_product_kernel.cpp")
    run([cross, "-std=gnu++17", "-O3", "-ffp-contract=fast", "-static", *shape, *sources, "-o", program])
    assert float(run([emulator, program, dtype]).stdout) <= 1e-6
