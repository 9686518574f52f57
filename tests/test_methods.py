"""The registry of methods tells the truth of the classes that it names, and nothing else knows a method's name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
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
