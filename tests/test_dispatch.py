"""The choice of backend on machines that are not here: GPUs of several generations, extensions built for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import native

from lvlm_fastxai import _native, info, ops
from lvlm_fastxai.errors import BackendUnavailableError
from lvlm_fastxai.ops import _backends, _dispatch

GPU = torch.device("cuda", 0)
pytestmark = [native, pytest.mark.parametrize("operator", ops.operators())]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that a GPU of one compute capability is there, and an extension that was built for some."""

    def pretend(built: tuple[int, ...], found: tuple[int, int], triton: bool = True) -> None:
        build = {**_native.build_info(), "cuda_architectures": built}
        monkeypatch.setattr(_native, "build_info", lambda: build)
        monkeypatch.setattr(_backends, "native_kernel_is_missing", lambda operator, key: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(
            _backends, "_triton_is_missing", lambda operator: None if triton else "triton is not installed"
        )
        monkeypatch.setattr(_backends, "_triton_does_not_load", lambda operator: None)
        monkeypatch.setattr(_backends, "triton_kernels", lambda operator: Interpreter)

    return pretend


class Interpreter:
    """The Triton kernels' module, of which only this is asked."""

    @staticmethod
    def is_interpreted() -> bool:
        return False


@pytest.mark.parametrize(
    ("built", "found", "choice"),
    [
        ((80, 90), (9, 0), "cuda"),
        ((80,), (8, 6), "cuda"),  # machine code of one generation runs on its later minor versions
        ((86,), (8, 0), "triton"),  # but not on earlier ones
        ((80, 90), (12, 0), "triton"),
        ((), (9, 0), "triton"),
        ((75,), (7, 5), "cuda"),
        ((80,), (7, 5), "reference"),  # Triton needs 8.0
    ],
)
def test_first_backend_that_was_built_for_the_device(
    operator: str, built: tuple[int, ...], found: tuple[int, int], choice: str, machine: Any
) -> None:
    machine(built, found)
    assert ops.chosen_backend(operator, GPU, torch.bfloat16) == choice


def test_without_triton_the_twin_serves(operator: str, machine: Any) -> None:
    machine((80,), (9, 0), triton=False)
    assert ops.chosen_backend(operator, GPU, torch.float16) == "reference"
    assert ops.backends(operator)["triton"] == "triton is not installed"


def test_a_forced_choice_says_what_was_built_and_what_was_found(operator: str, machine: Any) -> None:
    machine((80, 86), (9, 0))
    for backend, reason in (
        ("cuda", r"built for compute capabilities \[80, 86\], the device has 90"),
        ("cpu", "the tensors are on cuda:0"),
    ):
        with pytest.raises(BackendUnavailableError, match=reason):
            ops.chosen_backend(operator, GPU, torch.float32, backend)
    with ops.use_backend("triton"):
        assert ops.chosen_backend(operator, GPU, torch.float32) == "triton"
    with pytest.raises(BackendUnavailableError, match="served by the reference only"), ops.use_backend("cuda"):
        machine((90,), (9, 0))
        ops.chosen_backend(operator, GPU, torch.float64)


def test_info_names_what_was_built_and_what_was_found(operator: str, machine: Any) -> None:
    machine((80, 86), (9, 0))
    text = info.format_text(info.collect())
    assert "a GPU, compute capability 90" in text and "80, 86" in text
    assert text.count("off: built for compute capabilities [80, 86], the device has 90") == len(ops.operators())


def test_tensors_elsewhere_are_named(operator: str) -> None:
    problem = _dispatch.Problem(torch.device("meta"), torch.float32)
    for name, backend in ops.catalogue()[operator].backends.items():
        reason = backend.supports(problem)
        assert reason is None if name == "reference" else reason, name
