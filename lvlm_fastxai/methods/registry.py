"""What each relevancy method is, needs and costs: the only place where a method's name is known.

The command line, the cost estimate, the explainer, the report and the evaluation read it here, so a new method is its
own file and one entry in :data:`METHODS`. Neither torch nor transformers is imported before an implementation is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from ..errors import ArgumentError

__all__ = ["METHODS", "MethodName", "MethodTraits", "Option", "ReadOut", "find", "names"]

MethodName = Literal["chefer", "lvlm_interpret", "glimpse", "raw_attention", "fastrm"]
ReadOut = Literal["propagated", "scored", "predicted"]


@dataclass(frozen=True)
class Option:
    """One option of a method, as the command line offers it.

    Attributes:
        name: the attribute of the options' class; ``--depth-rate`` sets ``depth_rate``.
        help: one line for ``--help``.
        choices: the words that it takes; empty where it takes any text or a number.
        number: whether it takes a number.
        word: what may stand in the place of a number.
        metavar: how ``--help`` writes the value.
    """

    name: str
    help: str
    choices: tuple[str, ...] = ()
    number: bool = False
    word: str | None = None
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class MethodTraits:
    """What the rest of the package needs to know of one method.

    Attributes:
        name: by which users ask for it.
        title: its name in reports.
        summary: what it does, in one line.
        implementation: dotted path of its class, imported by :meth:`load`.
        options_type: dotted path of the class of its options; None where it has none.
        options: those of its options that the command line offers.
        sweeps: whether it reads a pass over the model's layers, which makes it a method of `relevancy_rows`.
        needs_gradient: whether it takes a backward. Without one the forward keeps no activations.
        needs_prompt_length: whether it must know the column at which the answer starts.
        needs_head: whether it takes a head that was trained for the model.
        weighs_tokens: whether it weighs the tokens in the maps of the whole answer; otherwise they count alike.
        companion: the method whose rows the same backward gives, for comparison; None without one.
        operators: the operators that it calls. Reports name the backend of the first.
        prunes_by_itself: whether ``row_tolerance="auto"`` finds anything to leave out.
        error_factors: what the two parts of a pruned sweep's error estimate count, relevancy that was left out and
            gradient that was dropped; calibrated by ``python -m benchmarks pruned calibrate``.
        attention_passes: matrix products of its own that a backward needs, in units of one causal pass of attention.
        all_columns: the option and its value with which gradients are summed over all columns, also those that no
            explained row sees; None where no such columns matter.
        stored_by_build_maps: whether ``fastrm build-maps`` may store its maps to train a head on.
        read_out: what a token's map is. "propagated": exact relevancy through every layer; "scored": scores as the
            method defines them; "predicted": a head's guess, of the image alone.
        colour: of its curve in plots.

    Example:
        >>> find("glimpse").companion
        'chefer'
    """

    name: MethodName
    title: str
    summary: str
    implementation: str
    colour: str
    operators: tuple[str, ...]
    read_out: ReadOut
    options_type: str | None = None
    options: tuple[Option, ...] = ()
    sweeps: bool = True
    needs_gradient: bool = True
    needs_prompt_length: bool = False
    needs_head: bool = False
    weighs_tokens: bool = False
    companion: MethodName | None = None
    prunes_by_itself: bool = True
    error_factors: tuple[float, float] = (1.7, 0.13)
    attention_passes: float = 1.0
    all_columns: tuple[str, str] | None = None
    stored_by_build_maps: bool = False

    def load(self) -> Any:
        """Import the class that implements the method."""
        return _imported(self.implementation)

    def load_options_type(self) -> type | None:
        """Import the class of the method's options; None where it has none."""
        kind: type | None = None if self.options_type is None else _imported(self.options_type)
        return kind

    def check_options(self, options: object) -> None:
        """Refuse options of another method.

        Raises:
            ArgumentError: the method takes no options, or options of another class.
        """
        if options is None:
            return
        kind = self.load_options_type()
        if kind is None or not isinstance(options, kind):
            expected = "no options" if kind is None else kind.__name__
            raise ArgumentError(f"options: method {self.name!r} takes {expected}, got {options!r}")

    def options_in_force(self, options: Any) -> dict[str, Any]:
        """Name every option's value, defaults included; empty for a method without options.

        Example:
            >>> find("glimpse").options_in_force(None)["stats_domain"]
            'full'
        """
        kind = self.load_options_type()
        return {} if kind is None else asdict(options or kind())

    def sums_all_columns(self, options: Any) -> bool:
        """Say whether columns that no explained row sees take part with these options (None: the defaults)."""
        if self.all_columns is None:
            return False
        name, value = self.all_columns
        return bool(self.options_in_force(options)[name] == value)


_GLIMPSE_OPTIONS = (
    Option(
        "propagation",
        "literal: the product of 2I + αE, as the paper writes it (default); identity: of I + αE",
        choices=("literal", "identity"),
    ),
    Option(
        "stats_domain",
        "columns over which attention gradients are summed for the weights of heads and layers: all of them (default, "
        "as published code does), or those that a row sees",
        choices=("full", "causal"),
    ),
    Option("head_temperature", "temperature of the weights of heads (default: 0.5)", number=True, metavar="L"),
    Option(
        "depth_rate",
        "how much upper layers count for more; 'scaled': 12.8 over the number of layers (default: 0.2)",
        number=True,
        word="scaled",
        metavar="L",
    ),
    Option("layers", "take the share F of the layers only, from the top (default: all)", metavar="all|top:F"),
)

METHODS: Mapping[str, MethodTraits] = MappingProxyType(
    {
        traits.name: traits
        for traits in (
            MethodTraits(
                name="chefer",
                title="Chefer et al. 2021, exact",
                summary="gradient-weighted attention, multiplied through all layers (Chefer et al. 2021)",
                implementation="lvlm_fastxai.methods.chefer.Chefer",
                operators=("relevancy_product",),
                read_out="propagated",
                stored_by_build_maps=True,
                colour="#0072B2",
            ),
            MethodTraits(
                name="lvlm_interpret",
                title="LVLM-Interpret, exact",
                summary="the maps that LVLM-Interpret takes while the model generates, from one pass",
                implementation="lvlm_fastxai.methods.lvlm_interpret.LvlmInterpret",
                operators=("relevancy_product",),
                read_out="propagated",
                needs_prompt_length=True,
                stored_by_build_maps=True,
                colour="#56B4E9",
            ),
            MethodTraits(
                name="glimpse",
                title="GLIMPSE",
                summary="heads and layers weighted by their gradients, tokens by what they rest on (GLIMPSE)",
                implementation="lvlm_fastxai.methods.glimpse.Glimpse",
                options_type="lvlm_fastxai.methods.glimpse_options.GlimpseOptions",
                options=_GLIMPSE_OPTIONS,
                operators=("relevancy_product", "glimpse_statistics", "glimpse_product"),
                read_out="scored",
                weighs_tokens=True,
                companion="chefer",
                # A tolerance of 0.01 is estimated to cost more than the rounding of a bf16 model hides.
                prunes_by_itself=False,
                error_factors=(1.9, 1.2),
                # Its sums are multiplied for all columns, the relevancy product for half of them.
                attention_passes=2.5,
                all_columns=("stats_domain", "full"),
                colour="#D55E00",
            ),
            MethodTraits(
                name="raw_attention",
                title="Last layer's mean attention",
                summary="the last layer's attention, averaged over heads: a baseline without a gradient",
                implementation="lvlm_fastxai.methods.raw_attention.RawAttention",
                operators=(),
                read_out="scored",
                needs_gradient=False,
                prunes_by_itself=False,
                attention_passes=0.0,
                colour="#E69F00",
            ),
            MethodTraits(
                name="fastrm",
                title="FastRM, predicted by a trained head",
                summary="maps that a trained head predicts while the model talks; approximate, of the image alone",
                implementation="lvlm_fastxai.fastrm.head.FastRM",
                operators=("proxy_relevancy",),
                read_out="predicted",
                sweeps=False,
                needs_gradient=False,
                needs_head=True,
                prunes_by_itself=False,
                attention_passes=0.0,
                colour="#009E73",
            ),
        )
    }
)


def find(name: str) -> MethodTraits:
    """Look up a method's traits.

    Raises:
        ArgumentError: no method has this name.

    Example:
        >>> find("chefer").needs_gradient
        True
    """
    if name not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def names(wanted: Callable[[MethodTraits], bool] = lambda traits: True) -> tuple[MethodName, ...]:
    """List the methods that have the wanted traits, in the registry's order.

    Example:
        >>> names(lambda traits: traits.stored_by_build_maps)
        ('chefer', 'lvlm_interpret')
    """
    return tuple(traits.name for traits in METHODS.values() if wanted(traits))


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
