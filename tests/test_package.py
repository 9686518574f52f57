"""The house is in order: imports point one way, and the documents tell the truth."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lvlm_fastxai as fx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlm_fastxai"

# Floors of the house, lowest first: a room may import from floors below its own and from itself.
FLOORS = (
    ("errors",),
    ("_native", "choices", "console", "files"),
    ("models", "training"),
    ("tiny",),
    ("reference", "triton_kernels", "families"),
    ("ops",),
    ("sweep", "prompting"),
    ("methods",),
    ("explain", "info"),
    ("evaluate",),
    ("fastrm",),
    ("review",),
    ("cli",),
)
# Rooms that may know transformers: below and beside them everything is tensors or plain data.
KNOW_TRANSFORMERS = {"sweep", "models", "prompting", "explain", "evaluate", "tiny", "info", "cli"}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports when it runs; imports for type checkers are left out."""
    module = path.relative_to(ROOT).with_suffix("").parts
    package = module[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *((node.module,) if node.module else ())))
            # `from . import ops` imports a module, `from .errors import ArgumentError` a name of one.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of a dotted name inside the package; None for the package itself and for everything outside."""
    parts = module.split(".")
    if parts[0] == "triton_kernels":  # where its sources lie; installed, it is a room like the others
        return "triton_kernels"
    if parts[0] != "lvlm_fastxai" or len(parts) < 2 or parts[1].startswith("__"):
        return None
    return parts[1]


def sources() -> list[Path]:
    inside = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return [*inside, *sorted((ROOT / "triton_kernels").rglob("*.py"))]


def test_imports_point_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in sources():
        home = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert home in floor, f"{path.relative_to(ROOT)} is on no floor; give it one in FLOORS"
        for module in imports(path):
            room = room_of(module)
            if room is not None and room != home and floor.get(room, -1) >= floor[home]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_only_few_rooms_know_transformers() -> None:
    knowing = {
        room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for path in sources()
        if any(module.split(".")[0] == "transformers" for module in imports(path))
    }
    assert knowing <= KNOW_TRANSFORMERS


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, time; started = time.process_time(); import lvlm_fastxai; "
        "print(time.process_time() - started, *{'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules))"
    )
    runs = [subprocess.check_output([sys.executable, "-c", program], text=True).split() for _ in range(3)]
    assert all(loaded == [] for _, *loaded in runs)
    assert min(float(seconds) for seconds, *_ in runs) < 0.5


PUBLIC = (
    *(
        "relevancy_rows",
        "explain_rows",
        "Explainer",
        "Explanation",
        "load_tiny_lvlm",
        "FastRM",
        "LiveMaps",
        "aggregate",
    ),
    *("Aggregator", "GlimpseOptions", "use_backend", "errors.ArgumentError", "review.Policy", "fastrm.stream"),
    *("families.known", "ops.backends", "ops.relevancy_product", "ops.attention_backward_relevancy"),
    *("ops.glimpse_statistics", "ops.glimpse_product", "ops.proxy_relevancy"),
)


def test_every_public_name_resolves_on_a_fresh_import() -> None:
    program = (
        "import operator, os, sys, torch; import lvlm_fastxai as fx\n"
        # Each submodule in a process where no other has imported it.
        "for name in sys.argv[1:]:\n"
        "    child = os.fork() if '.' in name and not name.startswith('ops.') else 0\n"
        "    if child:\n"
        "        assert os.waitpid(child, 0)[1] == 0, name\n"
        "        continue\n"
        "    operator.attrgetter(name)(fx)\n"
        "    if '.' in name and not name.startswith('ops.'): os._exit(0)\n"
    )
    names = sorted(PUBLIC, key=lambda name: "." not in name)
    run = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def parameters(function: Any) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


NO_DEFAULT = inspect.Parameter.empty
SIGNATURES: dict[str, tuple[list[str], dict[str, Any]]] = {
    # name: (positional parameters, keyword-only parameters with their defaults)
    "relevancy_rows": (
        ["model", "inputs", "targets"],
        {"method": "chefer", "memory": "fast", "row_tolerance": 0.0, "prompt_length": None},
    ),
    "Explainer": (["model", "processor"], {"method": "chefer", "memory": "fast", "row_tolerance": 0.0}),
    "Explainer.__call__": (["image", "question"], {"max_new_tokens": 64}),
    "Explainer.answer": (["image", "question"], {}),
    "Explainer.estimate": (["image", "question"], {}),
    "Explanation.save": (["directory"], {}),
    "Explanation.to_dict": ([], {}),
    "Explanation._repr_html_": ([], {}),
    "load_tiny_lvlm": ([], {}),
    "ops.relevancy_product": (
        ["query", "key", "value", "grad_output", "logsumexp", "row"],
        {
            "scale": None,
            "causal": True,
            "window": None,
            "query_positions": None,
            "lengths": None,
            "backend": None,
        },
    ),
    "ops.proxy_relevancy": (
        ["hidden", "query", "offset"],
        {"norm": "rms", "activation": "sigmoid", "eps": 1e-6, "lengths": None, "backend": None},
    ),
    "FastRM.from_pretrained": (["folder"], {}),
    "FastRM.save_pretrained": (["folder"], {}),
    "FastRM.predict": (["hidden", "state"], {"lengths": None, "backend": None}),
    "LiveMaps": (["head", "model", "inputs"], {"image_sizes": None, "image_processor": None, "on_step": None}),
    "ops.backends": ([NO_DEFAULT], {}),
    "aggregate": (["rows", "probabilities", "image_columns", "prompt_columns"], {}),
    "use_backend": (["name"], {}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name: str) -> None:
    function: Any = fx
    for part in name.split("."):
        function = getattr(function, part)
    positional, keywords = SIGNATURES[name]
    found = parameters(function)
    required = [p for p in found if p.default is NO_DEFAULT and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(required) == len(positional)
    for parameter, expected in zip(required, positional, strict=True):
        assert expected in (parameter.name, NO_DEFAULT)
    defaults = {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}
    assert keywords.items() <= defaults.items()
    assert all(p.default is not NO_DEFAULT for p in found if p not in required), "an addition needs a default"
    assert inspect.getdoc(function) or name.endswith("_repr_html_")


def test_public_attributes() -> None:
    from lvlm_fastxai.explain.data import TokenExplanation

    def attributes(kind: type) -> set[str]:
        return set(dir(kind)) | set(kind.__dataclass_fields__)  # type: ignore[attr-defined]

    assert {"answer", "tokens", "image_map", "prompt_scores", "confidence"} <= attributes(fx.Explanation)
    assert {"text", "token_id", "probability", "image_map", "prompt_scores"} <= attributes(TokenExplanation)
    assert set(fx.__all__) <= set(dir(fx))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    newest = re.search(r"^## \[(\d.+?)\]", read("CHANGELOG.md"), re.M)
    assert newest is not None and newest[1] == fx.__version__
    assert 'version = { attr = "lvlm_fastxai.__version__" }' in read("pyproject.toml")


def test_what_the_package_needs_is_locked() -> None:
    needed = re.search(r"^dependencies = \[(.*?)\]", read("pyproject.toml"), re.M | re.S)
    assert needed is not None
    locked = set(re.findall(r"^([\w.-]+)==", read("requirements/runtime.lock"), re.M))
    assert set(re.findall(r'"([\w-]+)', needed[1])) <= locked
    assert "torch==2.13.0" in read("requirements/runtime.lock").splitlines()
    everything = set(re.findall(r"^\S+==\S+", read("requirements/dev.lock"), re.M))
    for subset in ("runtime", "build"):
        assert set(re.findall(r"^\S+==\S+", read(f"requirements/{subset}.lock"), re.M)) <= everything


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_links_and_commands_of_the_documents_lead_somewhere() -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    wrong = []
    for document in documents():
        text = document.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"#]+)"', text)
        broken = [link for link in links if ":" not in link and not (document.parent / link).exists()]
        unknown = [f"make {name}" for name in re.findall(r"`make ([\w-]+)", text) if name not in targets]
        wrong += [f"{document.name}: {what}" for what in broken + unknown]
    assert not wrong


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", read("README.md"), re.S)
    assert example is not None
    run = subprocess.run([sys.executable, "-c", example[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    # A home or work folder at the start of a path; URLs have a host before it.
    machine_path = re.compile(rb"(?<![\w.~-])/(?:root|home|work|Users)/\w")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".png", ".safetensors", ".npz") or not path.is_file():
            continue
        wrong += [f"{name}: {found.decode()}" for found in machine_path.findall(path.read_bytes())]
    assert not wrong
