"""CUDA graphs: what surrounds them is tested with a stand-in on the CPU, they themselves only where there is a GPU."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.logger import Logger
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.adam import adam
from torch.utils import _pytree as pytree

from sb3_softsac import SoftSAC, optimizers
from sb3_softsac.execution import cuda_graph, inductor, runner
from sb3_softsac.execution.cpp import build
from sb3_softsac.execution.cuda_graph import CudaGraph, CudaGraphs
from sb3_softsac.execution.learner import Learner
from sb3_softsac.execution.way import Minibatches, Updates
from sb3_softsac.gradient_step import due

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="CUDA graphs need a GPU that torch can use")


class FakeCapture:
    """
    Captures and replays as a graph does, on the CPU: capturing runs nothing; a replay reads and writes the tensors that
    were there when it was captured, and puts its results where those of the last replay are.
    """

    def __init__(self, state: Callable[[], list[th.Tensor]]):
        self.state = state
        self.n_captures = self.n_replays = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.n_captures += 1
        addresses = [tensor.data_ptr() for tensor in self.state()]
        outputs: list[Any] = []

        def replay() -> None:
            self.n_replays += 1
            assert [x.data_ptr() for x in self.state()] == addresses, "a graph would write into memory that is gone"
            results = function()
            if not outputs:
                outputs.extend(results)
                return
            for place, result in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(list(results)), strict=True):
                if isinstance(place, th.Tensor):
                    place.copy_(result)
                else:
                    assert place == result

        return replay, outputs


class Counter:
    """Adds inputs to a total, in place."""

    def __init__(self) -> None:
        self.total = th.zeros(2)
        self.n_runs = 0
        self.seen: list[int] = []
        self.capture = FakeCapture(lambda: [self.total])
        self.graph = CudaGraph(self.add, lambda held: (self.total.data_ptr(),), self.capture)

    def add(
        self, total: th.Tensor, inputs: dict[str, th.Tensor], optional: th.Tensor | None
    ) -> tuple[th.Tensor, str, th.Tensor]:
        self.n_runs += 1
        self.seen = [x.data_ptr() for x in (*inputs.values(), optional) if x is not None]
        assert total is self.total
        self.total += inputs["a"].sum(0) * inputs["b"]
        if optional is not None:
            self.total += optional
        return self.total * 10, "name", self.total.sum()


def call(counter: Counter, a: float, b: float = 1.0, optional: float | None = None, rows: int = 3) -> list[Any]:
    inputs = {"a": th.full((rows, 2), a), "b": th.tensor(b)}
    outputs = list(counter.graph(counter.total, inputs, None if optional is None else th.full((2,), optional)))
    for tensor in inputs.values():
        tensor.fill_(float("nan"))  # a graph must not depend on the caller's tensors
    return outputs


def test_first_call_is_plain() -> None:
    """Libraries set themselves up in it."""
    counter = Counter()
    outputs = call(counter, 1.0)
    assert outputs[0].tolist() == [30.0, 30.0] and outputs[1] == "name"
    assert (counter.n_runs, counter.capture.n_captures, counter.graph.n_captures) == (1, 0, 0)


def test_later_calls_are_replays_of_one_capture() -> None:
    counter = Counter()
    results = [call(counter, float(i), b=2.0 * i) for i in range(1, 6)]
    totals = [6.0, 30.0, 84.0, 180.0, 330.0]
    assert [first[0].tolist() for first in results] == [[10 * t] * 2 for t in totals], "kept, not written over"
    assert [last[2].item() for last in results] == [2 * t for t in totals]
    assert counter.total.tolist() == [330.0, 330.0]
    assert counter.n_runs == 5, "each call runs once, also the one that captures"
    assert (counter.graph.n_captures, counter.capture.n_replays) == (1, 4)


def test_inputs_are_copied_to_the_same_place() -> None:
    counter = Counter()
    places = set()
    for i in range(4):
        call(counter, float(i), optional=1.0)
        if i > 0:
            places.add(tuple(counter.seen))
    assert len(places) == 1


def test_callers_tensors_are_not_written_to() -> None:
    counter = Counter()
    given = [({"a": th.full((3, 2), float(i)), "b": th.tensor(2.0)}, th.full((2,), float(i))) for i in range(4)]
    for inputs in given:
        counter.graph(counter.total, *inputs)
    for i, (tensors_, optional) in enumerate(given):
        assert tensors_["a"].eq(i).all() and tensors_["b"] == 2.0 and optional.eq(i).all(), i


def test_moved_state_is_captured_again() -> None:
    counter = Counter()
    for _ in range(3):
        call(counter, 1.0)
    old = counter.total
    counter.total.data = th.tensor([100.0, 200.0])  # the same tensor, elsewhere
    assert call(counter, 1.0)[0].tolist() == [1030.0, 2030.0]
    assert counter.graph.n_captures == 2
    counter.total = old.clone()
    call(counter, 1.0)
    assert counter.graph.n_captures == 3
    call(counter, 1.0)
    assert counter.graph.n_captures == 3
    assert counter.total.tolist() == [109.0, 209.0]


def test_other_shapes_are_captured_again() -> None:
    counter = Counter()
    for rows in (3, 3, 5, 5, 3):
        before = counter.total.clone()
        call(counter, 1.0, rows=rows)
        assert (counter.total - before).tolist() == [rows, rows]
    assert counter.graph.n_captures == 3


def test_absent_inputs() -> None:
    """``discounts`` of a batch is None, or not."""
    counter = Counter()
    given = [None, None, None, 4.0, 5.0, None, None]
    for optional in given:
        before = counter.total.clone()
        call(counter, 0.0, optional=optional)
        assert (counter.total - before).tolist() == [optional or 0.0] * 2
    assert counter.graph.n_captures == 3


@pytest.mark.parametrize("n_good", [0, 2])
def test_what_cannot_be_captured_runs_without_a_graph(n_good: int) -> None:
    counter = Counter()
    good = counter.capture

    def capture(function: Callable[[], Any]) -> Any:
        if good.n_captures < n_good:
            return good(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    counter.graph._capture = capture
    expected = 0.0
    with pytest.warns(UserWarning, match="cannot be captured .* slower: operation not permitted") as said:
        for i, rows in enumerate((3, 3, 5, 5, 3, 3)):
            expected += i * rows
            assert call(counter, float(i), rows=rows)[0].tolist() == [10 * expected] * 2
    assert len(said) == 1
    assert counter.graph.n_captures == n_good


# The whole update


def make(device: str = "cpu", **kwargs: Any) -> SoftSAC:
    # A zero gradient's rounding must not become a whole step of Adam
    policy_kwargs = {"net_arch": [16], "optimizer_kwargs": {"eps": 1e-3}}
    options = {"learning_starts": 20, "buffer_size": 300, "batch_size": 8, "policy_kwargs": policy_kwargs, "seed": 0}
    model = SoftSAC("MlpPolicy", gym.make("Pendulum-v1"), device=device, **{**options, **kwargs})
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model.learn(21)


def train(model: SoftSAC, n: int, seed: int = 0) -> None:
    th.manual_seed(seed)
    model.train(gradient_steps=n, batch_size=8)


def tensors(model: SoftSAC) -> list[th.Tensor]:
    """All that an update changes, whatever runs it."""
    return [tensor.detach().cpu() for tensor in Learner(model.policy, model._ent_coef).tensors()]


def assert_equal_tensors(expected: SoftSAC, actual: SoftSAC, atol: float) -> None:
    for i, (one, other) in enumerate(zip(tensors(expected), tensors(actual), strict=True)):
        th.testing.assert_close(other, one, atol=atol, rtol=1e-4, msg=lambda text, i=i: f"tensor {i}: {text}")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[CudaGraph]:
    """Updates on the CPU are captured by the stand-in; what is compiled is left as it is. The graphs that were made."""
    made: list[CudaGraph] = []

    def finish(self: CudaGraphs, run: Any) -> Any:
        made.append(CudaGraph(run, self._addresses, FakeCapture(self.learner.tensors)))
        return made[-1]

    monkeypatch.setattr(build, "suits_processor", lambda: False)
    monkeypatch.setattr(inductor, "compiled", lambda function, device: function)
    monkeypatch.setattr(CudaGraphs, "_finish", finish)
    monkeypatch.setattr(runner, "Inductor", CudaGraphs)
    return made


DELAYS = {"policy_delay": 2, "target_update_interval": 3, "use_actor_target": True}


@pytest.mark.parametrize("kwargs", [{}, DELAYS, {"n_steps": 3}, {"use_sde": True}, {"ent_coef": 0.1}])
def test_updates_in_graphs_equal_eager_ones(graphs: list[CudaGraph], kwargs: dict[str, Any]) -> None:
    eager, captured = make(compile=False, **kwargs), make(compile=True, **kwargs)
    for i, n in enumerate((1, 6, 13)):
        for model in (eager, captured):
            model._current_progress_remaining = 1.0 - 0.3 * i
            train(model, n, seed=i)
        for key, value in eager.logger.name_to_value.items():
            if key.startswith("train/"):
                assert captured.logger.name_to_value[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert eager._n_updates == captured._n_updates == 21
    assert_equal_tensors(eager, captured, atol=3e-5)
    assert [graph.n_captures for graph in graphs] == [1] * len(graphs)
    assert len(graphs) == (4 if kwargs is DELAYS else 1), "one for each combination of what is due"


def test_learning_rate_of_a_replay_is_the_present_one(graphs: list[CudaGraph]) -> None:
    model = make(compile=True, learning_rate=lambda progress: 1e-2 * progress)
    for progress in (1.0, 0.5, 0.0, 1.0):
        model._current_progress_remaining = progress
        before = [p.clone() for p in model.actor.parameters()]
        train(model, 2)
        moved = not all(th.equal(p, q) for p, q in zip(before, model.actor.parameters(), strict=True))
        assert moved == (progress > 0.0)
    assert [graph.n_captures for graph in graphs] == [1]


def test_state_that_was_loaded_is_captured_again(graphs: list[CudaGraph]) -> None:
    eager, captured = make(compile=False), make(compile=True)
    start = copy.deepcopy(eager.get_parameters())
    for model in (eager, captured):
        train(model, 4)
        model.set_parameters(copy.deepcopy(start))
        assert model.log_ent_coef is not None
        model.log_ent_coef.data = th.full((1,), -1.0)
        train(model, 4, seed=1)
    assert_equal_tensors(eager, captured, atol=3e-5)
    assert graphs[-1].n_captures > 1 or len(graphs) > 1


def test_network_that_was_exchanged_is_captured_again(graphs: list[CudaGraph]) -> None:
    model = make(compile=True)
    train(model, 4)
    captures = graphs[-1].n_captures
    model.policy.critic_target = copy.deepcopy(model.policy.critic_target)
    before = [p.clone() for p in model.policy.critic_target.parameters()]
    train(model, 3)
    assert sum(graph.n_captures for graph in graphs) == captures + 1
    assert all(not th.equal(p, q) for p, q in zip(before, model.policy.critic_target.parameters(), strict=True))


def test_fixed_coefficient_that_was_exchanged_is_captured_again(graphs: list[CudaGraph]) -> None:
    model = make(compile=True, ent_coef=0.1)
    train(model, 4)
    captures = graphs[-1].n_captures
    model.ent_coef_tensor = th.tensor(0.7)
    train(model, 3)
    assert graphs[-1].n_captures == captures + 1
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.7)


def assert_nan_leaves_all_as_it_was(model: SoftSAC) -> None:
    train(model, 3)
    before = [tensor.clone() for tensor in tensors(model)]
    model.replay_buffer.rewards[:] = float("nan")
    with pytest.raises(ValueError, match=r"critic_loss is nan .* at update 5"):
        train(model, 3)
    assert all(th.equal(one, other) for one, other in zip(before, tensors(model), strict=True))


def test_nan_in_a_graph_leaves_all_as_it_was(graphs: list[CudaGraph]) -> None:
    model = make(compile=True)
    assert_nan_leaves_all_as_it_was(model)
    assert model._n_updates == 4
    model.replay_buffer.rewards[:] = 1.0
    train(model, 3)
    assert model._n_updates == 7


def recorded(learner: Learner) -> cuda_graph.Capture:
    """Captures the operations and addresses of one run, as a CUDA graph does, whatever Python would do in the next."""

    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        state = learner.tensors()
        before = [tensor.detach().clone() for tensor in state]
        operations = make_fx(function, record_module_stack=False)()
        for tensor, value in zip(state, before, strict=True):
            tensor.data.copy_(value)
        outputs: list[Any] = []

        def replay() -> None:
            with th.no_grad():
                results = operations()
            if not outputs:
                outputs.extend(results)
            for place, result in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(results), strict=True):
                if isinstance(place, th.Tensor):
                    place.copy_(result)

        return replay, outputs

    return capture


def adam_on_tensors(*args: Any, **options: Any) -> None:
    """Adam as on a GPU: without reading its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th.compiler, "is_compiling", lambda: True)  # else it insists on a GPU
        adam(*args, **{**options, "capturable": True})


def freeze(parameters: Iterator[th.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


CHANGES: dict[str, Callable[[SoftSAC], Any]] = {
    "frozen actor": lambda model: freeze(model.actor.parameters()),
    "frozen layer": lambda model: freeze(model.critic.qf0[0].parameters()),
    "weight decay": lambda model: model.critic.optimizer.param_groups[0].update(weight_decay=5.0),
    "betas": lambda model: model.critic.optimizer.param_groups[0].update(betas=(0.1, 0.9)),
    "log_std_bounds": lambda model: setattr(model.actor, "log_std_bounds", (-5.0, -4.0)),
    "activation": lambda model: model.critic.qf0.__setitem__(1, th.nn.Tanh()),
    "unit norm": lambda model: setattr(model.policy, "unit_norm", "weights"),
    "hook": lambda model: model.critic.qf0[2].register_forward_hook(lambda module, inputs, outputs: outputs * 2),
    "hook of a gradient": lambda model: model.critic.qf0[2].weight.register_hook(lambda gradient: gradient * 0.0),
    "gamma": lambda model: setattr(model, "gamma", 0.5),
    "coefficient": lambda model: model.log_ent_coef.data.fill_(-2.0),
}


@pytest.mark.filterwarnings("ignore:.*leaves out hooks of a parameter's gradient")  # such updates are eager
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_replays_takes_effect(
    monkeypatch: pytest.MonkeyPatch, graphs: list[CudaGraph], change: Callable[[SoftSAC], Any]
) -> None:
    def finish(self: CudaGraphs, run: Any) -> Any:
        graphs.append(CudaGraph(run, self._addresses, recorded(self.learner)))
        return graphs[-1]

    monkeypatch.setattr(CudaGraphs, "_finish", finish)
    monkeypatch.setattr(optimizers, "adam", adam_on_tensors)
    eager, captured = make(compile=False), make(compile=True)
    for model in (eager, captured):
        train(model, 4)
    assert_equal_tensors(eager, captured, atol=3e-5)
    for model in (eager, captured):
        change(model)
        train(model, 3, seed=1)
    assert_equal_tensors(eager, captured, atol=3e-5)
    assert sum(graph.n_captures for graph in graphs) <= 2 and not any(graph._failed for graph in graphs)


# With a GPU


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled updates on the GPU, each launched kernel by kernel."""
    monkeypatch.setattr(cuda_graph, "CudaGraph", lambda function, addresses, capture: function)
    yield


@needs_gpu
@pytest.mark.parametrize("kwargs", [{}, DELAYS, {"n_steps": 3, "max_grad_norm": 0.5}])
def test_gpu_graph_equals_eager(kwargs: dict[str, Any]) -> None:
    eager, captured = make("cuda", compile=False, **kwargs), make("cuda", compile=True, **kwargs)
    for i, n in enumerate((1, 6, 13)):
        for model in (eager, captured):
            model._current_progress_remaining = 1.0 - 0.3 * i
            train(model, n, seed=i)
    assert_equal_tensors(eager, captured, atol=1e-4)
    assert captured._compiles
    runs = list(captured._runner.compiler.compiled.values())
    assert runs and all(isinstance(run, CudaGraph) and run.n_captures == 1 for run in runs)


@needs_gpu
@pytest.mark.usefixtures("no_graphs")
def test_gpu_compiled_equals_eager() -> None:
    eager, compiled = make("cuda", compile=False), make("cuda", compile=True)
    for model in (eager, compiled):
        train(model, 6)
    assert_equal_tensors(eager, compiled, atol=1e-4)
    assert compiled._compiles
    assert not any(isinstance(run, CudaGraph) for run in compiled._runner.compiler.compiled.values())


@needs_gpu
@pytest.mark.parametrize("on_device", [False, True])
def test_gpu_replay_does_not_wait(on_device: bool) -> None:
    """The host asks the device nothing during an update: it can prepare the next one meanwhile."""
    model = make("cuda", compile=True, buffer_on_device=on_device)
    train(model, 4)
    replay, finite = model._device_replay, model._runner._finite
    if replay is not None:
        replay.buffer.n_added += 1  # as if there was something new to copy
    options = model._update_options()
    th.cuda.synchronize()
    th.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3):
            storage = None if replay is None else replay.update()
            batch = (replay or model.replay_buffer).sample(8)
            what = due(options, model._n_updates + i)
            finite, (outcome,) = model._runner.compiler(
                Updates(Minibatches(batch, 1), 0, [what], storage, options, finite)
            )
    finally:
        th.cuda.set_sync_debug_mode("default")
    assert finite.item() and outcome.values.isfinite().all().item()
    (graph,) = model._runner.compiler.compiled.values()
    assert isinstance(graph, CudaGraph) and graph.n_captures == 1


@needs_gpu
def test_gpu_state_that_was_loaded_is_captured_again() -> None:
    eager, captured = make("cuda", compile=False), make("cuda", compile=True)
    start = copy.deepcopy(eager.get_parameters())
    for model in (eager, captured):
        train(model, 4)
        model.set_parameters(copy.deepcopy(start))
        train(model, 4, seed=1)
    assert_equal_tensors(eager, captured, atol=1e-4)


@needs_gpu
def test_gpu_nan_leaves_all_as_it_was() -> None:
    assert_nan_leaves_all_as_it_was(make("cuda", compile=True))


@needs_gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_gpu_saved_models_load_on_either_device(tmp_path: Path, first: str, second: str) -> None:
    model = make(first, compile=first == "cuda")
    train(model, 4)
    for optimizer in model.get_parameters()["critic.optimizer"], model.get_parameters()["ent_coef_optimizer"]:
        assert all(state["step"].device.type == "cpu" for state in optimizer["state"].values())
    model.save(tmp_path / "model")
    loaded = SoftSAC.load(tmp_path / "model", gym.make("Pendulum-v1"), device=second, compile=False)
    assert loaded.device.type == second
    for optimizer in (loaded.critic.optimizer, loaded.actor.optimizer, loaded.ent_coef_optimizer):
        assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
        assert all(state["exp_avg"].device.type == second for state in optimizer.state.values())
    assert_equal_tensors(model, loaded, atol=0.0)
    loaded.learn(3)
    assert loaded._n_updates == model._n_updates + 3
