"""The registry of methods tells the truth of the classes that it names, and nothing else knows a method's name."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import lvlm_fastxai as fx
from lvlm_fastxai import methods
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.methods import registry

NAMES = list(registry.METHODS)


def test_the_names_are_the_typed_choices() -> None:
    assert list(get_args(registry.MethodName)) == NAMES
    assert all(traits.name == name for name, traits in registry.METHODS.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_leads_to_its_implementation(name: str) -> None:
    traits = registry.find(name)
    assert traits.load().__module__ + "." + traits.load().__qualname__ == traits.implementation
    assert all(callable(getattr(fx.ops, operator)) for operator in traits.operators)
    assert traits.companion is None or traits.companion in registry.METHODS
    if traits.sweeps:
        assert issubclass(methods.find(name), methods.Method)
        assert methods.find(name) is traits.load()
    else:
        with pytest.raises(ArgumentError, match="method: expected one of chefer"):
            methods.find(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_options_are_those_of_the_class(name: str) -> None:
    traits = registry.find(name)
    kind = traits.load_options_type()
    if kind is None:
        assert traits.options == () and traits.options_in_force(None) == {} and not traits.sums_all_columns(None)
        with pytest.raises(ArgumentError, match="takes no options"):
            traits.check_options(fx.GlimpseOptions())
        return
    assert {option.name for option in traits.options} <= {field.name for field in dataclasses.fields(kind)}
    traits.check_options(kind())
    with pytest.raises(ArgumentError, match=f"takes {kind.__name__}"):
        traits.check_options({})
    for option in traits.options:
        # Every choice that is offered is one, and no other.
        for choice in option.choices:
            kind(**{option.name: choice})
        if option.choices:
            with pytest.raises(ArgumentError, match=", ".join(option.choices)):
                kind(**{option.name: "none of these"})
        if option.word is not None:
            kind(**{option.name: option.word})


def test_no_two_methods_share_an_option_of_the_command_line() -> None:
    options = [option.name for traits in registry.METHODS.values() for option in traits.options]
    assert len(options) == len(set(options))


def test_unread_columns_matter_to_glimpse_over_all_columns_alone() -> None:
    assert registry.names(lambda traits: traits.sums_all_columns(None)) == ("glimpse",)
    assert not registry.find("glimpse").sums_all_columns(fx.GlimpseOptions(stats_domain="causal"))


def test_the_registry_loads_nothing_heavy() -> None:
    program = (
        "import sys; from lvlm_fastxai.methods import registry; registry.find('glimpse'); "
        "print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == []


PACKAGE = Path(fx.__file__).parent


def names_tested(source: str) -> Iterator[int]:
    """Lines with a comparison with a method's name, or a collection that lists several of them by hand."""

    def named(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Constant) and node.value in NAMES

    for node in ast.walk(ast.parse(source)):
        entries: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                entries += part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            if any(map(named, entries)):
                yield node.lineno
        elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            listed = node.keys if isinstance(node, ast.Dict) else node.elts
            if sum(map(named, listed)) > 1:
                yield node.lineno


def test_no_method_is_known_by_name_outside_the_registry() -> None:
    # The head's evaluation names its predictors, two of which are called as methods are.
    exempt = {PACKAGE / "methods" / "registry.py", PACKAGE / "fastrm" / "evaluate.py"}
    paths = [path for path in PACKAGE.rglob("*.py") if path not in exempt]
    found = [f"{path}:{line}" for path in paths for line in names_tested(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'method == "glimpse"',
        'method in ("chefer", "x")',
        '("chefer", "glimpse", "x")',
        '{"chefer": 1, "fastrm": 2}',
    ],
)
def test_a_name_that_is_tested_is_found(source: str) -> None:
    assert list(names_tested(source)) != []
