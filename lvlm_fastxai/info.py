"""Show what is installed and which backends work: ``python -m lvlm_fastxai.info``, or ``lvlm-fastxai info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

__all__ = ["add_arguments", "collect", "format_text", "main", "run"]

PACKAGES = ("lvlm_fastxai", "torch", "transformers", "triton", "numpy", "pillow")
VARIABLES = ("LVLM_FASTXAI_BACKEND", "LVLM_FASTXAI_CPU_ISA", "LVLM_FASTXAI_NO_EXT", "TRITON_INTERPRET")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Describe this installation.

    Returns:
        A JSON-ready dict: "machine", "packages" (name → version or None), "native" ("reason" None when the library is
        loaded, "build" what it was built from), "cuda_devices", "operators" (operator → backend → None or the reason
        why it is off) and "environment" (our variables that are set).

    Example:
        >>> collect()["operators"]["relevancy_product"]["reference"] is None
        True
    """
    import torch

    from lvlm_fastxai import _native, ops

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append({"name": torch.cuda.get_device_name(index), "compute_capability": major * 10 + minor})
    return {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "processor": platform.machine(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "packages": {package: _version(package) for package in PACKAGES},
        "native": {"reason": _native.load(), "build": _native.build_info()},
        "cuda_devices": devices,
        "operators": {operator: ops.backends(operator) for operator in ops.operators()},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def format_text(info: dict[str, Any]) -> str:
    """Write the result of `collect` as text for people.

    Example:
        >>> print(format_text({name: {} for name in ("machine", "packages", "operators", "environment")}
        ...                   | {"native": {"reason": None, "build": {}}, "cuda_devices": []}))
        native library         loaded
    """
    lines = [f"{name:22} {value}" for name, value in info["machine"].items()]
    lines += [f"{name:22} {version or 'not installed'}" for name, version in info["packages"].items()]
    lines.append(f"{'native library':22} {info['native']['reason'] or 'loaded'}")
    for name, value in info["native"]["build"].items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"  {name:20} {text or 'none'}")
    for device in info["cuda_devices"]:
        lines.append(f"{'CUDA device':22} {device['name']}, compute capability {device['compute_capability']}")
    for operator, backends in info["operators"].items():
        lines.append(operator)
        lines += [
            f"  {name:20} {'usable' if reason is None else f'off: {reason}'}" for name, reason in backends.items()
        ]
    lines += [f"{name:22} {value}" for name, value in info["environment"].items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai info``."""
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description of this installation."""
    info = collect()
    print(json.dumps(info, indent=2) if args.json else format_text(info))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the description of this installation, as JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m lvlm_fastxai.info", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
