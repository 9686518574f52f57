"""smoke.py TREE BACKEND: the installed package works, is not the source tree's, and BACKEND is what serves a call."""

import sys
from pathlib import Path

import lvlm_fastxai as fx

tree, expected = Path(sys.argv[1]).resolve(), sys.argv[2]
home = Path(fx.__file__).resolve().parent
assert home.parent.name == "site-packages" and tree not in home.parents, f"imported from {home}"
assert "torch" not in sys.modules, "importing the package loads torch"

import importlib.util  # noqa: E402

import torch  # noqa: E402

from lvlm_fastxai.tiny import SAMPLE_IMAGE, SAMPLE_QUESTION  # noqa: E402

available = fx.ops.backends("relevancy_product")
assert available[expected] is None, available
assert expected == "cpu" or available["cpu"] is not None, available

for name, operator in fx.ops.catalogue().items():
    if "triton" in operator.backends and operator.composed_of is None:
        assert importlib.util.find_spec(f"lvlm_fastxai.triton_kernels.{name}"), (
            f"no Triton kernels of {name} are installed"
        )
assert importlib.util.find_spec("triton_kernels") is None, "a name of another package is taken"

torch.manual_seed(0)
query, grad_output = torch.randn(1, 4, 65, 32), torch.randn(1, 2, 4, 65, 32)
key, value = torch.randn(2, 1, 2, 65, 32)
scores = (query @ key.repeat_interleave(2, 1).mT) * 32**-0.5
hidden = torch.ones(65, 65, dtype=torch.bool).triu(1)
logsumexp = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
row = torch.rand(1, 2, 65)
arguments = (query, key, value, grad_output, logsumexp, row)
product = fx.ops.relevancy_product(*arguments, backend=expected)
torch.testing.assert_close(product, fx.ops.relevancy_product(*arguments, backend="reference"))
print(f"imported from site-packages, relevancy_product on {expected!r} agrees with the reference")

Path("sample.txt").write_text(str(SAMPLE_IMAGE))
Path("question.txt").write_text(SAMPLE_QUESTION)
