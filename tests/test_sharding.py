"""Models that are no longer in one place: heads split over two processes, layers spread over two devices or a disk."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import transformers
from PIL import Image
from support import models, oracle
from support.state import assert_same, fingerprint
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lvlm_fastxai as fx
from lvlm_fastxai import tiny
from lvlm_fastxai.errors import UnsupportedModelError
from lvlm_fastxai.explain.relevancy_rows import RelevancyRows, explain_rows
from lvlm_fastxai.sweep import descent as sweep
from lvlm_fastxai.sweep import pruning
from lvlm_fastxai.sweep.sharding import Ranks, find_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

# What a rank waits for the other, and what a test waits for both: a dead-lock is a failure, not a dead run.
RANK_SECONDS, TEST_SECONDS = 20, 40
CASES = [
    (method, memory, tolerance)
    for method in ("chefer", "lvlm_interpret")
    for memory in ("fast", "lean")
    for tolerance in (0.0, 0.2)
] + [("raw_attention", "fast", 0.0)]
FEWER_CASES = [
    ("chefer", "fast", 0.0),
    ("chefer", "min", 0.2),
    ("lvlm_interpret", "lean", 0.0),
    ("lvlm_interpret", "fast", 0.2),
    ("glimpse", "fast", 0.0),
    ("glimpse", "lean", 0.2),
    ("raw_attention", "fast", 0.0),
]


class TwoRanks:
    """Two processes in a gloo group on this machine, started once for all tests, which does not come free."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, folder / "rendezvous", theirs), daemon=True)
            process.start()
            theirs.close()  # so that a rank that dies is read as the end of its pipe
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()  # imports take their time, and are no dead-lock

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(*args)`` returns on each rank."""
        for pipe in self._pipes:
            pipe.send((work, args))
        deadline = time.monotonic() + TEST_SECONDS
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} is stuck"
            results.append(pipe.recv())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def serve(rank: int, rendezvous: Path, pipe: Any) -> None:
    """One rank's process: does what it is sent until it is killed."""
    torch.set_num_threads(1)
    # What torchrun tells a process; transformers reads it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    limit = timedelta(seconds=RANK_SECONDS)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    pipe.send("ready")
    while True:
        work, args = pipe.recv()
        try:
            pipe.send(work(*args))
        except Exception as error:
            traceback.print_exc()
            pipe.send(RuntimeError(f"rank {rank}: {error!r}"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo, also where there are GPUs
        if Path("/sys/class/net/lo").exists():
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        started = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def load_split(model_class: Any, folder: Path) -> Any:
    """The model as this version of transformers splits it over all ranks."""
    from transformers.distributed import DistributedConfig

    if hasattr(DistributedConfig(), "tp_size"):
        return model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    return model_class.from_pretrained(folder, tp_plan="auto")


def explain(
    model: nn.Module, inputs: Mapping[str, Any], method: str, memory: str, tolerance: float | str
) -> RelevancyRows:
    targets = [target for sample in range(len(inputs["input_ids"])) for target in models.answer_targets(inputs, sample)]
    starts = [min(row for s, row, _ in targets if s == sample) + 1 for sample in range(len(inputs["input_ids"]))]
    return explain_rows(
        model, inputs, targets, method=method, memory=memory, row_tolerance=tolerance, prompt_length=starts
    )


def all_cases(model_class: Any, folder: Path, inputs: dict[str, Any]) -> list[RelevancyRows]:
    model = load_split(model_class, folder)
    with torch.no_grad():
        model(**inputs)  # transformers hangs hooks of its own on the vision tower in the first forward
    before = fingerprint(model)
    found = [explain(model, inputs, *case) for case in CASES]
    assert_same(before, fingerprint(model))
    return found


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_rows_of_split_heads_are_those_of_one_process(name: str, ranks: TwoRanks, tmp_path: Path) -> None:
    batch = {"batch": 2, "padding": "left"} if name == "llama" else {}
    model, inputs = models.build(name, torch.float32, text=40, **batch)
    assert models.HEADS > models.KEY_VALUE_HEADS > 1
    model.save_pretrained(tmp_path)
    for case, *found in zip(CASES, *ranks.run(all_cases, type(model), tmp_path, inputs), strict=True):
        truth = explain(model, inputs, *case)
        for result in found:
            assert float(oracle.relative_error(result.rows, truth.rows).max()) <= 1e-5, case
            torch.testing.assert_close(result.logits, truth.logits, rtol=1e-4, atol=1e-5)
        if case[2] > 0:
            kept = truth.certificate.rows_kept
            assert kept.float().mean() < 0.8 * inputs["input_ids"].shape[1]
            assert all(bool((result.certificate.rows_kept == kept).all()) for result in found)


def with_another_opinion(model_class: Any, folder: Path, inputs: dict[str, Any]) -> tuple[RelevancyRows, RelevancyRows]:
    """A pruned and an "auto" sweep in which the second rank would keep more rows, and trust no pruned one."""
    model = load_split(model_class, folder)
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            choose = sweep.select_rows
            patch.setattr(sweep, "select_rows", lambda norms, tolerance, **more: choose(norms, tolerance / 2, **more))
            patch.setattr(pruning, "estimated_error", lambda missing, *more: torch.ones_like(missing))
        pruned = explain(model, inputs, "chefer", "lean", 0.2)
        return pruned, explain(model.to(torch.bfloat16), inputs, "chefer", "lean", "auto")


def test_ranks_that_would_choose_differently_do_what_the_first_does(ranks: TwoRanks, tmp_path: Path) -> None:
    model, inputs = models.build("llama", torch.float32, text=140)
    model.save_pretrained(tmp_path)
    first, second = ranks.run(with_another_opinion, type(model), tmp_path, inputs)
    truth = explain(model, inputs, "chefer", "lean", 0.2)
    for result in (first[0], second[0]):
        assert float(oracle.relative_error(result.rows, truth.rows).max()) <= 1e-5
    torch.testing.assert_close(first[1].rows, second[1].rows, rtol=0, atol=0)
    assert torch.equal(first[1].certificate.rows_kept, second[1].certificate.rows_kept)


def refusals(model_class: Any, folder: Path, inputs: dict[str, Any]) -> list[str]:
    """What is said of heads that two ranks cannot share, and of a model that was split by other hands."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    undivided = load_split(model_class, folder)
    by_hand = models.make_model("llama", torch.float32)
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in by_hand.get_decoder().layers:  # type: ignore[operator]
        parallelize_module(layer, mesh, plan)
    said = []
    for model in (undivided, by_hand):
        with pytest.raises(UnsupportedModelError) as caught:
            explain(model, inputs, "chefer", "lean", 0.0)
        said.append(str(caught.value))
    return said


def test_heads_that_cannot_be_shared_are_refused(ranks: TwoRanks, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**models.text_config(2), "num_key_value_heads": 1})
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    inputs = models.make_sample("llama", model)
    for undivided, by_hand in ranks.run(refusals, type(model), tmp_path, inputs):
        assert undivided == "LlamaForCausalLM: its 1 heads (num_key_value_heads) cannot be split evenly over 2 ranks"
        assert by_hand.startswith("a decoder layer ran 2 of 4 heads in this process")


def answers(image: Image.Image) -> list[fx.Explanation]:
    model = load_split(transformers.LlavaForConditionalGeneration, tiny.WEIGHTS).float().eval()
    processor = transformers.LlavaProcessor.from_pretrained(tiny.WEIGHTS, local_files_only=True)
    explainer = {memory: fx.Explainer(model, processor, memory=memory) for memory in ("fast", "lean")}
    return [each(image, tiny.SAMPLE_QUESTION, max_new_tokens=4) for each in explainer.values()]


def test_the_explainer_answers_on_every_rank(ranks: TwoRanks) -> None:
    image = Image.open(tiny.SAMPLE_IMAGE).convert("RGB")
    truth = fx.Explainer(*fx.load_tiny_lvlm())(image, tiny.SAMPLE_QUESTION, max_new_tokens=4)
    for explanation in (each for rank in ranks.run(answers, image) for each in rank):
        assert explanation.answer == truth.answer
        for token, expected in zip(explanation.tokens, truth.tokens, strict=True):
            found, known = torch.from_numpy(token.image_map), torch.from_numpy(expected.image_map)
            assert float((found - known).abs().sum() / known.abs().sum()) <= 1e-5
            assert token.probability == pytest.approx(expected.probability, rel=1e-4)


def test_a_model_in_one_place_has_one_rank() -> None:
    model = models.make_model("llama", torch.float32)
    assert find_ranks(model, model.config) == Ranks()
    tensor = torch.ones(2)
    assert Ranks().mean(tensor) is tensor and Ranks().agree(tensor) is tensor


def test_heads_that_no_rank_splits_need_not_divide() -> None:
    mesh = SimpleNamespace(ndim=1, device_type="cpu", get_group=lambda name: "group")
    plan = {"layers.*.self_attn.k_proj": "colwise_rep", "layers.*.mlp.up_proj": "colwise"}
    model: Any = SimpleNamespace(_tp_size=2, _device_mesh=mesh, tp_plan=plan)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=1)
    assert find_ranks(model, config) == Ranks(2, "group", "cpu")


# Two devices on a machine that has one. A tensor that is `Away` says that it is on `AWAY`; an operation on tensors of
# both places fails as between two GPUs. ("meta" is the one device type beside the CPU that is in every torch.)
AWAY = torch.device("meta")


class Away(Tensor):
    """A tensor on the other device; its numbers are kept in ``here``."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        made = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=AWAY)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run_operator(operator, args, kwargs or {})


def run_operator(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run one operator on the numbers, after a check that its tensors are in one place."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = any(isinstance(tensor, Away) for tensor in tensors)
    if operator not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        # As in torch: a number may come from the CPU, and so may the indices of another device's tensor.
        indexes = operator.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        indices = {id(index) for index in args[1]} if indexes and isinstance(args[0], Away) else set()
        strangers = [t for t in tensors if not isinstance(t, Away) and t.dim() > 0 and id(t) not in indices]
        assert not (away and strangers), f"{operator} on two devices"
    device = kwargs.get("device")
    to_away = away if device is None else torch.device(device) == AWAY
    plain = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    known = {id(here(tensor)): tensor for tensor in tensors}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else Away(leaf) if to_away else leaf

    return tree_map(wrap, operator(*tree_map(here, args), **tree_map(here, plain)))


def here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, Away) else leaf


class TwoDevices(TorchDispatchMode):
    """Makes tensors on ``AWAY`` and moves tensors there."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run_operator(operator, args, kwargs or {})


class FromLists(TorchFunctionMode):
    """Numbers and indices given as lists become tensors where no operator sees it; made here, they do."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function is Tensor.__getitem__:
            tensor, index = args
            index = index if isinstance(index, tuple) else (index,)
            args = tensor, tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
        return function(*args, **kwargs)


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    with TwoDevices(), FromLists():
        yield


def put(module: nn.Module, device: torch.device) -> None:
    """Weights and forward to a device, inputs to it in each forward, as accelerate does."""
    if device == AWAY:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(Away(parameter.detach())))
    forward = module.forward

    def moved(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return forward(*args, **kwargs)

    module.forward = moved  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_layers_on_two_devices(name: str) -> None:
    whole, inputs = models.build(name, torch.float32, layers=4, text=40)
    spread: Any = models.make_model(name, torch.float32, layers=4)
    decoder = spread.get_decoder()
    with two_devices():
        for index, layer in enumerate(decoder.layers):
            put(layer, AWAY if index % 2 else torch.device("cpu"))
        put(decoder.norm, AWAY)
        put(spread.lm_head, AWAY)
    for case in FEWER_CASES:
        truth = explain(whole, inputs, *case)
        with two_devices():
            found = explain(spread, inputs, *case)
        assert isinstance(found.rows, Away)
        assert float(oracle.relative_error(found.rows.here, truth.rows).max()) <= 1e-5


def test_the_two_devices_of_the_test_do_not_mix() -> None:
    with two_devices():
        near, far = torch.ones(2), torch.ones(2, device=AWAY)
        assert far.to("cpu").tolist() == [1, 1] and (far + near.to(AWAY)).device == AWAY
        for mix in (lambda: near + far, lambda: near[far.long()], lambda: torch.stack([near, far])):
            with pytest.raises(AssertionError, match="on two devices"):
                mix()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_layers_that_accelerate_keeps_on_disk(name: str, tmp_path: Path) -> None:
    whole, inputs = models.build(name, torch.float32, layers=4, text=40)
    spread: Any = models.make_model(name, torch.float32, layers=4)
    before = fingerprint(spread)
    layers = {id(layer): index for index, layer in enumerate(spread.get_decoder().layers)}
    places: dict[str, str] = {}
    for path, module in spread.named_modules():
        if id(module) in layers:
            places[path] = "disk" if layers[id(module)] % 2 else "cpu"
        elif not any(path.startswith(f"{place}.") for place in places) and list(module.parameters(recurse=False)):
            places[path] = "cpu"
    accelerate.dispatch_model(spread, places, offload_dir=tmp_path, force_hooks=True)
    for case in FEWER_CASES:
        truth, found = explain(whole, inputs, *case), explain(spread, inputs, *case)
        assert float(oracle.relative_error(found.rows, truth.rows).max()) <= 1e-5
    assert sum(parameter.device.type == "meta" for parameter in spread.parameters()) > 0
    assert before["requires_grad"] == fingerprint(spread)["requires_grad"]
