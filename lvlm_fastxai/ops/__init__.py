"""Operators: contract, argument checks and choice of backend. No operator knows a model."""

from lvlm_fastxai.choices import BackendName as BackendName
from lvlm_fastxai.ops._dispatch import BACKENDS as BACKENDS
from lvlm_fastxai.ops._dispatch import Operator as Operator
from lvlm_fastxai.ops._dispatch import backends as backends
from lvlm_fastxai.ops._dispatch import catalogue as catalogue
from lvlm_fastxai.ops._dispatch import chosen_backend as chosen_backend
from lvlm_fastxai.ops._dispatch import operators as operators
from lvlm_fastxai.ops._dispatch import use_backend as use_backend
from lvlm_fastxai.ops._operators import *  # noqa: F403
from lvlm_fastxai.ops.key_ranges import key_ranges as key_ranges
