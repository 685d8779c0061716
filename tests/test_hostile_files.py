"""
Files that somebody has made to do harm: they load nothing, run nothing, and nothing is written or removed for them.

All are whole in form: their sizes and hashes are right, so that what stands behind these checks is what is tested. An
audit hook watches for processes, unpickling, and changes of files elsewhere.
"""

import base64
import copy
import io
import json
import os
import pathlib
import pickle
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from crash_tools import in_child, load, make_buffer, mutate, needs_little, save_on
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softsac import SoftSAC, checkpoint
from sb3_softsac.persistence import buffer_state
from sb3_softsac.persistence.archive import INDEX, ArchiveWriter, CheckpointError
from sb3_softsac.persistence.run_folder import RunFolder, _manifest_text

pytestmark = pytest.mark.damage

Members = dict[str, bytes]
PROCESSES = ("os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "ctypes.dlopen")
PROCESSES += ("pickle.find_class", "socket.connect", "os.putenv", "code.__new__")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


@pytest.fixture(scope="module")
def env() -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make("Pendulum-v1")])


@pytest.fixture(scope="module")
def model(env: DummyVecEnv) -> SoftSAC:
    model = SoftSAC(
        "MlpPolicy", env, policy_kwargs={"net_arch": [4]}, buffer_size=24, learning_starts=5, batch_size=4, seed=0,
        device="cpu",
    )  # fmt: skip
    return model.learn(20)


@pytest.fixture(scope="module")
def whole(model: SoftSAC) -> tuple[Members, dict[str, Any]]:
    """Members and index of a model file."""
    file = io.BytesIO()
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(members.pop(INDEX))
    return members, {name: value for name, value in index.items() if name not in ("format", "members")}


def build(members: Members, index: dict[str, Any] | None) -> bytes:
    """A model file with the right sizes and hashes; None: one as of SB3, without any."""
    file = io.BytesIO()
    if index is None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return file.getvalue()
    with ArchiveWriter(file) as writer:
        for name, data in members.items():
            with writer.member(name) as stream:
                stream.write(data)
        writer.close(index)
    return file.getvalue()


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


def payloads(canary: pathlib.Path) -> list[Payload]:
    return [
        Payload(os.system, f"touch {canary}"),
        Payload(open, str(canary), "w"),
        Payload(eval, f"open({str(canary)!r}, 'w')"),
        Payload(th.load, str(canary)),
    ]


def pickles(payload: Payload) -> Iterator[bytes]:
    """In all forms that ``torch.load`` knows."""
    for content in (payload, {"a": payload, "b": th.ones(2)}):
        for protocol in (2, 4):
            yield pickle.dumps(content, protocol)
        for new_form in (False, True):
            file = io.BytesIO()
            th.save(content, file, _use_new_zipfile_serialization=new_form)
            yield file.getvalue()


def watched(folder: pathlib.Path, canary: pathlib.Path, work: Callable[[], Any]) -> None:
    """
    Do something in a child, and make sure that nothing else happens.

    :param folder: where files may be changed
    :param canary: must not be there afterwards
    :param work: what is done
    """

    def in_peace(report: Callable[[str], None]) -> None:
        sys.dont_write_bytecode = True

        def is_inside(path: Any) -> bool:
            return not isinstance(path, str | bytes | os.PathLike) or folder in pathlib.Path(os.fsdecode(path)).parents

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in PROCESSES:
                report(f"{event} {args}"[:300])
            elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull:
                if not is_inside(args[0]):
                    report(f"{event} {args}"[:300])
            elif event in CHANGES and not is_inside(args[0]):
                report(f"{event} {args}"[:300])

        sys.addaudithook(hook)
        work()
        report("done")

    reports, status = in_child(in_peace)
    assert os.waitstatus_to_exitcode(status) == 0, "see the output"
    assert reports == ["done"]
    assert not canary.exists()


def try_to_load(path: pathlib.Path, env: DummyVecEnv, model: SoftSAC) -> int:
    """:return: number of ways in which it was loaded all the same"""
    n_loaded = 0
    for arguments in ({}, {"env": env}, {"env": env, "force_reset": False}):
        try:
            SoftSAC.load(path, device="cpu", **arguments)  # type: ignore[arg-type]
            n_loaded += 1
        except ValueError:  # most are CheckpointError
            pass
    try:
        model.load_replay_buffer(path)
    except ValueError:
        pass
    for command in (["ls"], ["verify"], ["export", "-o", path.parent / "exported.zip"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["checkpoint", command[0], str(path), *map(str, command[1:])])
            assert checkpoint.main() in (0, 1)
    return n_loaded


def attack(
    files: list[bytes],
    refused: bool,
    tmp_path: pathlib.Path,
    env: DummyVecEnv,
    model: SoftSAC,
    canary: pathlib.Path,
) -> None:
    (tmp_path / "inside").mkdir(exist_ok=True)
    path = tmp_path / "inside" / "model.zip"

    def work() -> None:
        warnings.simplefilter("ignore")
        for i, data in enumerate(files):
            path.write_bytes(data)
            n_loaded = try_to_load(path, env, model)
            assert not (n_loaded and refused), f"file {i} was loaded"
            assert not canary.exists(), f"file {i} did it"

    watched(tmp_path / "inside", canary, work)


def sum_loaded(data: bytes, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC) -> int:
    (tmp_path / "whole.zip").write_bytes(data)
    return try_to_load(tmp_path / "whole.zip", env, model)


@pytest.fixture
def canary(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "canary"


# -- The watch ---------------------------------------------------------------------------------------------------------


def test_the_watch_notices(tmp_path: pathlib.Path, canary: pathlib.Path) -> None:
    (tmp_path / "inside").mkdir()
    data = pickle.dumps(payloads(canary)[1])
    for work in (
        lambda: os.system("true"),
        lambda: pickle.loads(data),
        lambda: (tmp_path / "other").write_text(""),
        lambda: os.mkdir(tmp_path / "folder"),
        lambda: os.replace(tmp_path / "other", tmp_path / "another"),
        lambda: os.unlink(tmp_path / "another"),
    ):
        with pytest.raises(AssertionError):
            watched(tmp_path / "inside", canary, work)
    canary.unlink()
    watched(tmp_path / "inside", canary, lambda: (tmp_path / "inside" / "x").write_text(""))


# -- Pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_index", [True, False])
def test_pickles_among_the_parameters(
    has_index: bool, whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    files = [
        build({**members, name: data}, index if has_index else None)
        for name in members
        if name.endswith(".pth")
        for payload in payloads(canary)[:2]
        for data in pickles(payload)
    ]
    assert not has_index or sum_loaded(build(members, index), tmp_path, env, model) == 3  # the whole one can be loaded
    # A file of SB3 can only be read where its ``data`` is ours, and that is refused without its index
    attack(files, True, tmp_path, env, model, canary)


def test_scripts_among_the_parameters(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        th.jit.save(th.jit.script(th.nn.Linear(1, 1)), script)
    attack([build({**members, "policy.pth": script.getvalue()}, index)], True, tmp_path, env, model, canary)


def test_pickles_in_data(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    data = json.loads(members["data"])
    files = []
    for payload in payloads(canary):
        serialized = {":type:": "x", ":serialized:": base64.b64encode(pickle.dumps(payload)).decode()}
        changed = [{**data, name: serialized} for name in [*data, "new", "__class__", "__reduce__"]]
        changed.append({name: serialized for name in data})
        for tree in changed:
            files += [build({**members, "data": json.dumps(tree).encode()}, i) for i in (index, None)]
    attack(files, True, tmp_path, env, model, canary)
    # Deeper down, it is a dict like others
    nested = {
        **data,
        "policy_kwargs": {"net_arch": [4], "optimizer_kwargs": serialized},
        "tensorboard_log": [serialized],
    }
    attack([build({**members, "data": json.dumps(nested).encode()}, index)], True, tmp_path, env, model, canary)


def test_pickles_among_the_arrays(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    files = []
    for name in [name for name in members if name.endswith(".npy")]:
        for payload in payloads(canary)[:2]:
            array = np.empty(20, dtype=object)
            array[:] = payload
            file = io.BytesIO()
            np.lib.format.write_array(file, array, version=(2, 0), allow_pickle=True)
            arrays = {**index["replay"]["description"]["arrays"], name.split("/")[-1].removesuffix(".npy"): ["|O", []]}
            description = {**index["replay"]["description"], "arrays": arrays}
            told = {**index, "replay": {**index["replay"], "description": description}}
            files += [
                build({**members, name: data}, i)
                for data in (file.getvalue(), pickle.dumps(payload))
                for i in (index, told)
            ]
    path = tmp_path / "inside" / "model.zip"

    def work() -> None:
        for data in files:
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                SoftSAC.load(path, env, device="cpu")
            SoftSAC.load(path, device="cpu")  # leaves the arrays alone
            with pytest.raises(CheckpointError):
                model.load_replay_buffer(path)

    path.parent.mkdir()
    watched(tmp_path / "inside", canary, work)


def test_pickles_in_the_index(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    text = base64.b64encode(pickle.dumps(payloads(canary)[0])).decode()
    values = [
        text,
        {":serialized:": text},
        {"$": "bytes", "data": text},
        [text],
        {"$": "object", "class": "x", "state": text},
    ]
    files = [build(members, {**index, name: value}) for name in index for value in values]
    attack(files, False, tmp_path, env, model, canary)


def test_pickled_replay_buffers(tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path) -> None:
    for payload in payloads(canary):
        for name in ("buffer.pkl", "buffer"):
            path = tmp_path / "inside" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(payload))

            def work(path: pathlib.Path = path) -> None:
                for given in (path, str(path), io.BytesIO(path.read_bytes())):
                    with pytest.raises(CheckpointError, match="allow_pickle=True"):
                        model.load_replay_buffer(given)
                with pytest.raises(CheckpointError):
                    SoftSAC.load(path, env)

            watched(path.parent, canary, work)


def test_replay_buffers_of_sb3_when_trusted(model: SoftSAC, env: DummyVecEnv, tmp_path: pathlib.Path) -> None:
    theirs = SB3ReplayBuffer(24, env.observation_space, env.action_space, device="cpu")
    for i in range(5):
        row = np.full((1, 3), i, dtype=np.float32)
        theirs.add(row, row + 1, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    (tmp_path / "buffer.pkl").write_bytes(pickle.dumps(theirs))
    ours = SoftSAC("MlpPolicy", env, buffer_size=24, device="cpu")
    for given in (tmp_path / "buffer.pkl", tmp_path / "buffer", io.BytesIO(pickle.dumps(theirs))):
        ours.load_replay_buffer(given, allow_pickle=True)
        assert ours.replay_buffer is not None
        assert ours.replay_buffer.observations[:5, 0, 0].tolist() == [0, 1, 2, 3, 4]


# -- Names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "os.system",
    "torch.os.system",
    "torch.hub.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.serialization.pickle.loads",
    "numpy.ctypeslib.ctypes.CDLL",
    "stable_baselines3.common.save_util.cloudpickle.loads",
    "stable_baselines3.common.vec_env.SubprocVecEnv",
    "gymnasium.spaces.box.Box",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.container.Sequential",
    "torch.optim.sgd.SGD",
    "stable_baselines3.her.her_replay_buffer.HerReplayBuffer",
    "stable_baselines3.common.policies.BasePolicy",
    "torch.jit.ScriptModule",
    "torch.fx.graph_module.GraphModule",
    "this",
    "antigravity",
]


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_names_in_place_of_everything(
    every: int, whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    data = json.loads(members["data"])
    arguments = {"cmd": f"touch {canary}", "args": [f"touch {canary}"], "command": f"touch {canary}"}
    files = []
    for name in NAMES:
        for kind in ("class", "object", "enum"):
            value = {"$": kind, "name": name, "class": name, "state": arguments, "items": [f"touch {canary}"]}
            kwargs = [
                {"features_extractor_class": value, "features_extractor_kwargs": arguments},
                {"activation_fn": value},
                {"optimizer_class": value, "optimizer_kwargs": arguments},
            ]
            changes = [{key: value} for key in data] + [
                {"policy_kwargs": {**data["policy_kwargs"], **k}} for k in kwargs
            ]
            changes.append({"replay_buffer_class": value, "replay_buffer_kwargs": arguments})
            changes.append({"_setup_model": value, "predict": value, "learn": value, "set_parameters": value})
            if kind != "class":
                changes = changes[::9]
            files += [build({**members, "data": json.dumps({**data, **change}).encode()}, index) for change in changes]
    attack(files[::every], False, tmp_path, env, model, canary)


MEMBERS = [
    "../../canary",
    "/tmp/../canary",
    "..\\..\\canary",
    "canary",
    "__class__.x.pth",
    "policy.__init__.pth",
    "__init__.__globals__.pth",
    "env.pth",
    "replay_buffer.pth",
    "../policy.pth",
    "policy.pth/",
    "",
    "a" * 60000,
    "\x1b[31mred",
    "new\nline",
]


def test_names_of_members(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    members, index = whole
    files = [build({**members, name: members["policy.pth"]}, index) for name in MEMBERS]
    attack(files, False, tmp_path, env, model, canary)
    attack(files[4:9], True, tmp_path, env, model, canary)  # parameters that no model has
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as archive:
        info = zipfile.ZipInfo("data")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    attack([link.getvalue()], True, tmp_path, env, model, canary)


def test_listing_shows_no_control_characters(
    whole: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could change what the terminal shows."""
    members, index = whole
    path = tmp_path / "model.zip"
    path.write_bytes(build({**members, "\x1b[31mred\n\r": b""}, {**index, "num_timesteps": "\x1b[31m\r"}))
    monkeypatch.setattr(sys, "argv", ["checkpoint", "ls", str(path)])
    assert checkpoint.main() == 0
    shown = capsys.readouterr().out
    assert "red" in shown
    assert not any(ord(character) < 32 and character != "\n" for character in shown)


def test_torch_variables(
    whole: Any, tmp_path: pathlib.Path, env: DummyVecEnv, model: SoftSAC, canary: pathlib.Path
) -> None:
    """Only variables that the model has are set, and only to tensors of their shape."""
    members, index = whole
    variables: list[Any] = [
        {"log_ent_coef": th.zeros(1), "__class__": th.zeros(1), "policy": th.zeros(1), "actor.optimizer": th.ones(1)},
        {"log_ent_coef": th.zeros(2)},
        {"log_ent_coef": "x"},
        {"log_ent_coef": {"data": 1}},
        ["log_ent_coef"],
        "x",
        {"log_ent_coef": th.zeros(1).expand(1)},
    ]
    files = []
    for tree in variables:
        file = io.BytesIO()
        th.save(tree, file)
        files.append(build({**members, "pytorch_variables.pth": file.getvalue()}, index))
    attack(files[1:6], True, tmp_path, env, model, canary)
    (tmp_path / "model.zip").write_bytes(files[0])
    loaded = SoftSAC.load(tmp_path / "model.zip", env, device="cpu")
    assert type(loaded) is SoftSAC
    assert loaded.log_ent_coef is not None
    assert loaded.log_ent_coef.item() == 0.0
    assert not isinstance(loaded.policy, th.Tensor)
    assert isinstance(loaded.actor.optimizer, th.optim.Optimizer)


# -- Memory ------------------------------------------------------------------------------------------------------------


def compressed(state: Any) -> bytes:
    plain, packed = io.BytesIO(), io.BytesIO()
    th.save(state, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


def saved_state(state: Any, new_form: bool = True) -> bytes:
    file = io.BytesIO()
    th.save(state, file, _use_new_zipfile_serialization=new_form)
    return file.getvalue()


def test_parameters_that_grow(whole: Any, env: DummyVecEnv) -> None:
    members, index = whole
    policy = th.load(io.BytesIO(members["policy.pth"]), weights_only=True)
    optimizer = th.load(io.BytesIO(members["actor.optimizer.pth"]), weights_only=True)
    for state in optimizer["state"].values():
        state["exp_avg"] = th.zeros(1, dtype=th.float16).expand(100_000_000)
    bombs = [
        ("policy.pth", compressed({**policy, "more": th.zeros(100_000_000)})),
        ("policy.pth", saved_state({**policy, "more": Payload(bytearray, 1_000_000_000)})),
        ("policy.pth", saved_state({**policy, "more": Payload(bytearray, 1_000_000_000)}, new_form=False)),
        ("actor.optimizer.pth", saved_state(optimizer)),
    ]

    def work() -> None:
        for name, data in bombs:
            with pytest.raises(CheckpointError, match=name):
                SoftSAC.load(io.BytesIO(build({**members, name: data}, index)), env, device="cpu")

    needs_little(work)


def test_random_states_outside_of_their_memory(whole: Any, env: DummyVecEnv) -> None:
    members, index = whole
    for position in (-1, 10**6, 2**31 - 1, -(2**31)):
        changed = json.loads(json.dumps(index))
        changed["random"]["numpy"]["state"]["pos"] = position
        with pytest.raises(CheckpointError, match=f"cannot be at position {position}"):
            SoftSAC.load(io.BytesIO(build(members, changed)), env, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": []}, "has 0 rows of 20"),
        ({"segments": [[4, 20]]}, "lacks the rows from 0 on|has no member"),
        ({"segments": [[0, 20], [0, 20]]}, "lacks the rows from 20 on"),
        ({"segments": [[0, 10**12]]}, "holds float32 of shape"),
        ({"segments": [[0, -1]]}, "holds float32 of shape"),
        ({"segments": 3}, "cannot be read"),
        ({"pos": 24}, "the next to be written is 24"),
        ({"pos": -1}, "the next to be written is -1|has 20 rows"),
        ({"pos": 10**30}, "the next to be written"),
        ({"pos": float("nan")}, "cannot be read"),
        ({"full": True}, "has 20 rows of 24"),
        ({"buffer_size": 10**9, "full": True}, "has 20 rows of 1000000000"),
        ({"buffer_size": 10**15}, "cannot be read"),
        ({"buffer_size": -5}, "cannot be read|rows"),
        ({"n_envs": 10**9}, "cannot be read|rows"),
    ],
)
def test_rows_that_are_not_there(change: dict[str, Any], message: str, whole: Any, env: DummyVecEnv) -> None:
    members, index = whole
    changed = json.loads(json.dumps(index))
    replay = changed["replay"]
    for name, value in change.items():
        part = replay["description"] if name in replay["description"] else replay
        part = replay["state"]["own"] if name in replay["state"]["own"] else part
        assert name in part
        part[name] = value

    def work() -> None:
        with pytest.raises(CheckpointError, match=message):
            SoftSAC.load(io.BytesIO(build(members, changed)), env, device="cpu")

    needs_little(work)


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 10**6, 2**31, 2**63, 2**64, 10**12, 10**30, -(10**12), 1e308, 0.5),
    *(float("nan"), float("inf"), "", "x", "a" * 1000, "../../etc", "auto", [], {}, [[]], [1, 2, 3], {"a": 1}),
    {"$": "tuple", "items": []},
    {"$": "array", "dtype": "<f8", "shape": [10**12], "data": ""},
    {"$": "array", "dtype": "|O", "shape": [1], "data": ""},
    {"$": "bound", "dtype": "<f8", "shape": [1000, 1000], "data": "AAAAAAAAAAA="},
    {"$": "class", "name": "torch.nn.modules.linear.Linear"},
    {"$": "object", "class": "gymnasium.spaces.box.Box", "state": {}},
    {"$": "generator", "state": {}},
    {"$": "deque", "maxlen": -1, "items": []},
    {"$": "x"},
]
NEW_NAMES = (
    "__class__",
    "__dict__",
    "learn",
    "_setup_model",
    "policy",
    "env",
    "new",
    "replay_buffer",
    "_vec_normalize_env",
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def look_up(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def mutate_tree(tree: Any, rng: np.random.Generator) -> Any:
    """Put something else somewhere, remove something, or have it twice."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        place, other = (found[i] for i in rng.integers(len(found), size=2))
        part, value = look_up(tree, place[:-1]), copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        match int(rng.integers(6)):
            case 0:
                del part[place[-1]]
            case 1:
                value = look_up(tree, other)
                part[place[-1]] = json.loads(json.dumps(value))
            case 2 if isinstance(part, dict):
                part[str(rng.choice(NEW_NAMES))] = value
            case _:
                part[place[-1]] = value
    return tree


def load_mutated(whole: Any, env: DummyVecEnv, n: int) -> None:
    members, index = whole
    rng = np.random.default_rng(0)
    counts = {"loaded": 0, "refused": 0}
    names = [name for name in members if name != "data"]
    data = json.loads(members["data"])
    warnings.simplefilter("ignore")
    for i in range(n):
        changed, changed_index = dict(members), index
        match i % 4:
            case 0:
                changed_index = mutate_tree(index, rng)
            case 1 | 2:
                changed["data"] = json.dumps(mutate_tree(data, rng)).encode()
            case 3:
                name, other = rng.choice(names, size=2).tolist()
                changed[name] = mutate(members[name], members[other], rng)
        file = io.BytesIO(build(changed, changed_index))
        try:
            SoftSAC.load(file, env if i % 5 else None, device="cpu", force_reset=bool(i % 3))
            counts["loaded"] += 1
        except ValueError:
            counts["refused"] += 1
    assert counts["refused"] > n // 3
    assert counts["loaded"] > n // 20, "all stop at the first check"


def test_mutations_with_right_hashes(whole: Any, env: DummyVecEnv) -> None:
    needs_little(lambda: load_mutated(whole, env, 1000), megabytes=400)


@pytest.mark.slow
def test_more_mutations_with_right_hashes(whole: Any, env: DummyVecEnv) -> None:
    needs_little(lambda: load_mutated(whole, env, 20_000), megabytes=400)


# -- Folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(buffer_state, "SMALL", 1)
    for _ in save_on(RunFolder(tmp_path / "inside" / "run"), make_buffer(), 0, 3, keep_last=2):
        pass
    return tmp_path / "inside" / "run"


OUTSIDE = [
    "../../canary",
    "../canary.npz",
    "/etc/passwd",
    "replay/../../canary",
    "replay/00000-00016-0123456789abcdef.npz/../x",
]


def test_manifests_that_name_files_elsewhere(run: pathlib.Path, canary: pathlib.Path) -> None:
    folder = RunFolder(run)
    whole = folder.manifest(folder.numbers()[-1])
    outside = run.parents[1] / "canary.txt"
    outside.write_text("x")
    for name in [*OUTSIDE, "../../canary.txt", str(outside), "ckpt-000001.json", "replay", "", "\x00", "a" * 5000]:
        for segments in (False, True):
            manifest = json.loads(json.dumps(whole))
            (manifest["segments"][0] if segments else manifest["state"])["file"] = name
            (run / "ckpt-000002.json").write_bytes(_manifest_text(manifest))
            with pytest.raises(CheckpointError, match="names files that are not part of a checkpoint"):
                folder.manifest(2)
            with pytest.warns(UserWarning, match="Falling back to checkpoint 1"):
                loaded, buffer, step = load(run)
    # Going on from there removes them, and nothing else
    watched(run.parent, canary, lambda: list(save_on(loaded, buffer, step, 3)))
    assert outside.read_text() == "x"
    assert load(run)[2] == step + 33


def test_links_out_of_the_folder(run: pathlib.Path, canary: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What looks like a file of ours, but is a link: the link may go, what it leads to stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = {
        "00000-00016-0123456789abcdef.npz",
        "step-1-000000.zip",
        "ckpt-000000.json",
        f".x.{os.uname().nodename}.1.tmp",
    }
    for name in kept:
        (elsewhere / name).write_text("mine")
    (run / "step-1-000000.zip").symlink_to(elsewhere / "step-1-000000.zip")
    (run / "ckpt-000000.json").symlink_to(elsewhere / "ckpt-000000.json")
    (run / "replay" / "00000-00016-0123456789abcdef.npz").symlink_to(elsewhere / "00000-00016-0123456789abcdef.npz")
    (run / "step-2-000000.zip").symlink_to(elsewhere)
    loaded, buffer, step = load(run)
    watched(run.parent, canary, lambda: list(save_on(loaded, buffer, step, 3)))
    assert {path.name for path in elsewhere.iterdir() if path.read_text() == "mine"} == kept


def test_a_replay_folder_that_is_a_link(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """To that of another run: its segments stay."""
    other = tmp_path / "other"
    folder, buffer = RunFolder(other), make_buffer()
    list(save_on(folder, buffer, 5, 2))
    before = sorted(path.name for path in (other / "replay").iterdir())
    for path in (run / "replay").iterdir():
        path.rename(other / "replay" / path.name)
    (run / "replay").rmdir()
    (run / "replay").symlink_to(other / "replay")
    loaded, buffer, step = load(run)
    for _ in save_on(loaded, buffer, step, 4):
        pass
    assert set(before) <= {path.name for path in (other / "replay").iterdir()}
    folder.verify(folder.manifest(folder.numbers()[-1]))
