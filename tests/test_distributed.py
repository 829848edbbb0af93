"""Two processes on a CPU train like one: losses, weights, statistics over prompts; and FSDP2 through the driver."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_align.config import TrainConfig
from t2i_align.errors import T2IError
from t2i_align.methods import method_class, read_method
from t2i_align.methods.base import Tools
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from t2i_align.pipelines.toy import ToyDenoiser, toy_pipeline
from t2i_align.policy import Policy
from t2i_align.policy.sharded import blank_of, shard
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer
from t2i_align.rewards.constraints import Constraint, Limited
from t2i_align.training import Ctx, TrainingError, World, fit
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
METHODS = {
    "ddpo": {"use": "ddpo", "group": 2, "min_count": 3, "minibatches": 2, "clip": 0.2, "batch_size": 2},
    "grpo": {"use": "grpo", "spread": "global", "minibatches": 2, "epochs": 2, "beta": 0.02, "clip": 0.2},
    "d3po": {"use": "d3po", "group": 4, "pairs": "all", "clip": None, "batch_size": 8},
    "prdp": {"use": "prdp", "beta": 1.0, "eps": 0.2},
    "vard": {"use": "vard", "warmup": 2, "eta": 0.1, "minibatches": 2, "value": {"net": "conv", "width": 8}},
    "doubt": {"use": "grpo", "discount": 1.0, "gae": 0.5, "clip": 0.2},
    "refl": {"use": "refl", "scale": 1.0, "goal": 9.0, "minibatches": 2},
    "draft": {"use": "draft", "lv": 2, "batch_size": 2},
    "limited": {"use": "draft", "group": 1, "batch_size": 2, "minibatches": 2},
    "alignprop": {"use": "alignprop", "kernel": "ddim(1.0)"},
    "dpo": {"use": "diffusion_dpo", "group": 2, "beta": 20.0, "minibatches": 2, "times": "grid", "drop_captions": 0.2},
    "kto": {"use": "diffusion_dpo", "loss": "kto", "online": True, "beta": 5.0, "times": "grid", "sft": 0.1},
    "nft": {"use": "nft", "slope": 0.2, "minibatches": 2},
    "rwr": {"use": "rwr", "levels": 2, "times": "grid", "images": "base", "solver": "ode"},
}
LAUNCHED = {
    "model": {"use": "base", "guidance": 1.0},
    "policy": {"use": "lora", "rank": 2},
    "method": {"use": "grpo", "group": 2, "steps": 2, "batch_size": 2, "trained_rows": 1.0},
    "reward": "jpeg_compressibility",
    "prompts": {"use": "playground", "size": 8, "per_round": 2},
    "train": {"steps": 2, "learning_rate": 0.001, "log_every": 1, "checkpoint_every": 2},
    "evaluate": {
        "every": 2,
        "prompts": {"use": "playground", "size": 1, "split": "heldout"},
        "images": 1,
        "steps": 1,
        "kl_images": 1,
    },
    "log": {"tensorboard": False},
}
SHARDABLE = [name for name, block in METHODS.items() if method_class(block["use"]).shardable]
ROUND = ["0", "0.5", "1", "1.5"]


class Reward(Scorer):
    """Doubts bright images."""

    name = "reward"
    differentiable = True

    def forward(self, images, prompts):
        return reward(images, prompts.text), images.mean((1, 2, 3))


class Light(Reward):
    """Another one, for a constraint."""

    name = "light"


class Nothing(Reward):
    """No number for any image."""

    def forward(self, images, prompts):
        return images.mean((1, 2, 3)) * torch.nan


def reward(images, prompts):
    return (16 * (images[:, 0] - 0.5)).mean((1, 2)) + torch.tensor([0.3 * float(text) for text in prompts])


def train(name, folder, world, sharded=False, stop=None, resume=False):
    """Five updates or more on the toy; Ctrl-C before the round `stop`."""
    pipe = toy_pipeline(size=2)
    found, settings = read_method({"group": 4, "steps": 3, "batch_size": 4} | METHODS[name])
    scorer = Limited(Reward(), [Constraint(Light(), "at_least", 3.0)]) if name == "limited" else Reward()
    method = found(settings, Policy.full(pipe, shard=sharded), Tools(Driver(pipe), scorer))
    steps = 8 if method.updates == 4 else 6
    every = {"checkpoint_every": 2, "log_every": 1}
    config = TrainConfig(steps=steps, learning_rate=0.05, weight_decay=0.0, ema=0.9, **every)
    pictures = Path(folder).parent
    columns = {side: tuple(str(pictures / f"{side}-{text}.png") for text in ROUND) for side in ("better", "worse")}

    def data(number):
        if number == stop:
            raise KeyboardInterrupt
        return Prompts(tuple(ROUND), columns)

    return fit(method, data, config, folder, world=world, resume=resume)


def train_on_nothing(folder, world):
    """Reward gradients without a single reward are found by each process among its own images."""
    found, settings = read_method({"use": "draft", "group": 4, "steps": 3, "batch_size": 4})
    pipe = toy_pipeline(size=2)
    method = found(settings, Policy.full(pipe), Tools(Driver(pipe), Nothing()))
    with pytest.raises(TrainingError, match="have a reward that is no number"):
        fit(method, lambda number: Prompts.of(ROUND), TrainConfig(steps=2), Path(folder) / "nothing", world=world)


def train_in_parts(name, folder, world, sharded=False):
    """The same, interrupted once and resumed."""
    with pytest.raises(KeyboardInterrupt):
        train(name, folder, world, sharded, stop=1)
    train(name, folder, world, sharded, resume=True)


def train_lora(folder, world):
    """Five updates of a LoRA on a small Stable Diffusion, with the sizes of what each sums over processes."""
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    pipe.set_progress_bar_config(disable=True)
    settings = {"use": "grpo", "group": 4, "steps": 3, "batch_size": 4, "clip": 0.2, "beta": 0.1}
    found, options = read_method(settings)
    method = found(options, Policy.lora(pipe, rank=2), Tools(Driver(pipe, guidance_scale=3.0), Reward()))
    sizes, reduce = [], distributed.all_reduce

    def counted(values, *args, **named):
        if values.numel() > 1:  # else a count or a loss
            sizes[-1].append(values.numel())
        return reduce(values, *args, **named)

    def data(number):
        sizes.append([])
        return Prompts.of(ROUND)

    distributed.all_reduce = counted
    try:
        config = TrainConfig(steps=5, learning_rate=1e-3, weight_decay=0.0)
        state = fit(method, data, config, folder, world=world)
    finally:
        distributed.all_reduce = reduce
    if world.first:
        weights = {name: weight.detach() for name, weight in state.weights.items()}
        torch.save({"weights": weights, "sizes": sizes}, Path(folder) / "lora.pt")


def draw_pairs(folder):
    """Pictures of the toy's size; those of a pair differ in all channels, or Adam would learn from rounding errors."""
    for i, text in enumerate(ROUND):
        for side, color in (("better", (160 + 5 * i, 110 - i, 140)), ("worse", (100 - 5 * i, 140, 120 + 2 * i))):
            Image.new("RGB", (2, 2), color).save(folder / f"{side}-{text}.png")


def shard_fully(folder, world):
    """Three SGD steps on all weights of a small Stable Diffusion, sharded over the processes by FSDP2."""
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    driver = Driver(pipe)
    cond = driver.encode(["a", "b"])
    x = driver.start(cond, 3, seed=1)
    if world.count > 1:
        from torch.distributed.device_mesh import init_device_mesh

        shard(pipe.unet, init_device_mesh("cpu", (world.count,)))
    optimizer = torch.optim.SGD(pipe.unet.parameters(), lr=0.1)
    mine = world.share(2)
    losses = []
    for row in range(3):
        q = driver.step(x[mine], row, cond[mine], 3, ddim(1.0)).q
        loss = q.mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(world.total(loss.item()) / world.count)
    weights = {}
    for name, p in pipe.unet.named_parameters():
        weights[name] = (p.full_tensor() if world.count > 1 else p).detach().clone()
    if world.first:
        torch.save({"weights": weights, "losses": losses}, Path(folder) / f"fsdp-{world.count}.pt")


def whole_run(folder):
    """A run from its config: folder, evaluations and result are the first process's work."""
    from t2i_align.training.run import train as start
    from tests.test_run import CONFIG

    place = Path(folder)
    sources = {"prompts.path": str(place / "prompts.txt"), "evaluate.prompts.path": str(place / "heldout.txt")}
    stop = {"evaluate.stop": {"watch": "reward", "patience": 2}, "method.batch_size": 4, "train.learning_rate": 0.03}
    done = start(CONFIG, pipeline=toy_pipeline(size=8), out=str(place / "run"), **sources, **stop)
    assert (done.step, done.kept["step"]) == (6, 6)


def sharded_run(folder, world):
    """A run from its config on all weights in shards over the processes, stopped and resumed."""
    from t2i_align.training.run import train as start
    from tests.test_run import CONFIG

    place = Path(folder)
    changes = {"prompts.path": str(place / "prompts.txt"), "evaluate.prompts.path": str(place / "heldout.txt")}
    changes |= {"method.beta": 0.1, "method.batch_size": 4, "train.ema": 0.9, "policy.shard": world.count > 1}
    changes |= {"evaluate.stop": {"watch": "reward", "patience": 2}}
    options = {"out": str(place / "sharded"), "resume": True} | changes
    start(CONFIG, pipeline=toy_pipeline(size=8), minutes=0, **options)
    done = start(CONFIG, pipeline=toy_pipeline(size=8), **options)
    assert done.step == 6


def teach(folder, world):
    """Two lessons of a value function; before the second one the processes' weights and moments differ."""
    found, settings = read_method({"group": 4, "steps": 3, "batch_size": 4} | METHODS["vard"])
    method = found(settings, Policy.full(toy_pipeline(size=2)), Tools(Driver(toy_pipeline(size=2)), Reward()))
    method.collect(Ctx(0, 0, torch.device("cpu"), world=world), Prompts.of(ROUND))
    critic = method.critic
    for p in critic.served.value.parameters():
        p.add_(0.1 * world.rank)
        critic.optimizer.state[p]["exp_avg"].add_(0.1 * world.rank)
    method.collect(Ctx(0, 2, torch.device("cpu"), world=world), Prompts.of(ROUND))
    state = critic.state()
    torch.save({name: state[name] for name in ("value", "optimizer")}, Path(folder) / f"value-{world.rank}.pt")


def work(folder):
    """What each of the processes does; all jobs in one, since starting takes longest."""
    world = World.join()
    for name in METHODS:
        train(name, Path(folder) / name, world)
        if name in SHARDABLE:
            train_in_parts(name, Path(folder) / f"shards-{name}", world, sharded=True)
    shard_fully(folder, world)
    train_lora(Path(folder) / "lora", world)
    train_on_nothing(folder, world)
    teach(folder, world)
    whole_run(folder)
    sharded_run(folder, world)  # at whose end the processes part


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of the same jobs in two processes and in one."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    for folder in (two, one):
        (folder / "prompts.txt").write_text("\n".join(f"0.{i}" for i in range(9)))
        (folder / "heldout.txt").write_text("0.11\n0.55\n0.77")
        draw_pairs(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_distributed import work; work(sys.argv[1])"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(two)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        for name in METHODS:
            train(name, one / name, World())
        shard_fully(one, World())
        train_lora(one / "lora", World())
        train_on_nothing(one, World())
        teach(one, World())
        whole_run(one)
        sharded_run(one, World())
        for process in started:
            _, complaint = process.communicate(timeout=240)
            assert process.returncode == 0, complaint.decode()[-3000:]
            assert "destroy_process_group" not in complaint.decode()
    finally:
        for process in started:
            process.kill()
    return one, two


def same_weights(saved):
    for part in ("weights", "average"):
        for key, weight in saved[0][part].items():
            assert weight.abs().sum() > 0.01  # it has moved
            torch.testing.assert_close(weight, saved[1][part][key], rtol=0, atol=1e-6)


def same_numbers(one, two):
    for alone, together in zip(rows(one), rows(two), strict=True):
        assert alone.keys() == together.keys()
        for key in {"loss", "gradient_norm", "reward", "reward_spread", "ratio"} & alone.keys():
            assert alone[key] == pytest.approx(together[key], rel=2e-5, abs=1e-6)


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_like_one(both, name):
    one, two = (folder / name for folder in both)
    saved = [torch.load(max((f / "checkpoints").glob("*.pt")), weights_only=True) for f in (one, two)]
    assert saved[0]["step"] == saved[1]["step"] >= 5
    same_weights(saved)
    assert saved[0]["method"].keys() == saved[1]["method"].keys()
    same_numbers(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_bit_identically(both, name):
    one, _ = both
    train_in_parts(name, one / f"{name}-parts", World())
    whole, parts = (
        torch.load(max((one / n / "checkpoints").glob("*.pt")), weights_only=True) for n in (name, f"{name}-parts")
    )
    assert whole["step"] == parts["step"]
    for part in ("weights", "average"):
        for key, weight in whole[part].items():
            assert torch.equal(weight, parts[part][key])


@pytest.mark.parametrize("name", SHARDABLE)
def test_weights_in_shards_train_like_one_process_and_resume(both, name):
    folders = both[0] / name, both[1] / f"shards-{name}"
    saved = [torch.load(max((f / "checkpoints").glob("*.pt")), weights_only=True) for f in folders]
    assert saved[0]["step"] == saved[1]["step"] >= 5
    same_weights(saved)
    same_numbers(*folders)


def test_a_run_in_shards_is_that_of_one_process(both):
    one, two = (folder / "sharded" for folder in both)
    for name in ("step-00000006.pt", "best.pt"):
        same_weights([torch.load(f / "checkpoints" / name, weights_only=True) for f in (one, two)])
    same_numbers(one, two)
    for alone, together in zip(rows(one, "evaluations"), rows(two, "evaluations"), strict=True):
        assert alone["step"] == together["step"]
        assert alone["kl"] == pytest.approx(together["kl"], rel=1e-4, abs=1e-6)
        assert alone["reward"] == pytest.approx(together["reward"], abs=1e-6)
    assert rows(two, "evaluations")[-1]["kl"] > 0
    notes = [json.loads((folder / "model" / "policy.json").read_text()) for folder in (one, two)]
    assert notes[0] == notes[1]
    networks = [ToyDenoiser.from_pretrained(folder / "model", subfolder="denoiser") for folder in (one, two)]
    torch.testing.assert_close(networks[0].shift, networks[1].shift, rtol=0, atol=1e-6)


def test_prompt_statistics_are_those_of_all_processes(both):
    trackers = [
        torch.load(f / "ddpo" / "checkpoints" / "step-00000006.pt", weights_only=True)["method"]["tracker"]
        for f in both
    ]
    assert trackers[0].keys() == trackers[1].keys() == set(ROUND)
    for prompt, values in trackers[0].items():
        assert values == pytest.approx(trackers[1][prompt], abs=1e-5)


def test_all_weights_are_trained_in_shards(both):
    one, two = (torch.load(f / f"fsdp-{n}.pt", weights_only=True) for f, n in zip(both, (1, 2), strict=True))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], rtol=1e-4, atol=1e-6)


def test_a_lora_trains_like_in_one_process_with_one_reduction_of_gradients_an_update(both):
    one, two = (torch.load(folder / "lora" / "lora.pt", weights_only=True) for folder in both)
    count = sum(weight.numel() for weight in one["weights"].values())
    for name, weight in one["weights"].items():
        assert weight.any()  # those that start at 0, too
        torch.testing.assert_close(weight, two["weights"][name], rtol=0, atol=1e-6)
    assert two["sizes"] == [[count]] * 5
    assert one["sizes"] == [[]] * 5


def test_a_run_of_two_processes_is_written_once(both):
    one, two = (folder / "run" for folder in both)
    files = [folder / "checkpoints" / "step-00000006.pt" for folder in (one, two)]
    saved = [torch.load(file, weights_only=True)["weights"] for file in files]
    for name, weight in saved[0].items():
        torch.testing.assert_close(weight, saved[1][name], rtol=0, atol=1e-6)
    for folder in (one, two):
        assert [row["step"] for row in rows(folder)] == [2, 4, 6]
        assert [row["step"] for row in rows(folder, "evaluations")] == [0, 2, 4, 6]
        assert (folder / "README.md").exists()
        assert (folder / "model" / "policy.json").exists()


def test_value_functions_that_drifted_apart_are_one_after_a_lesson(both):
    one, two = both
    files = [two / "value-0.pt", two / "value-1.pt", one / "value-0.pt"]
    first, second, alone = (torch.load(file, weights_only=True) for file in files)
    for name, weight in first["value"].items():
        assert torch.equal(weight, second["value"][name])
        torch.testing.assert_close(weight, alone["value"][name], rtol=0, atol=1e-6)
    for place, moments in first["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name], second["optimizer"]["state"][place][name])


@pytest.mark.parametrize(("gpus", "current", "bound"), [(0, [], None), (1, [], None), (2, [1], "cuda:1")])
def test_a_process_makes_its_gpu_the_current_one(monkeypatch, gpus, current, bound):
    done, joined = [], {}
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)

    def join(backend, **options):
        joined.update(options, backend=backend, after=list(done))

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    assert World.join() == World(3, 4, 1)
    assert joined["after"] == done == current  # set before NCCL connects
    assert joined["backend"] == ("cpu:gloo,cuda:nccl" if gpus else "gloo")
    assert joined["device_id"] == (bound and torch.device(bound))


def test_a_blank_network_is_made_without_room_and_keeps_all_else():
    network = FAMILIES["sd"]().pipe.unet
    network.table = torch.arange(3.0)  # no buffer, as the positions of some transformers
    with Largest() as largest:
        blank = blank_of(network)
    assert largest.numel < max(p.numel() for p in network.parameters()) / 10
    assert {name: p.shape for name, p in blank.state_dict().items()} == {
        name: p.shape for name, p in network.state_dict().items()
    }
    assert {tensor.device.type for tensor in (*blank.parameters(), *blank.buffers())} == {"meta"}
    assert torch.equal(blank.table, network.table)
    assert all(p.requires_grad for p in blank.parameters())
    assert next(network.parameters()).device.type == "cpu"


class Largest(TorchDispatchMode):
    """The largest tensor made on a real device."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type != "meta":
            self.numel = max(self.numel, found.numel())
        return found


def test_prompts_must_be_shared_equally():
    assert World(1, 2).share(6) == slice(3, 6)
    with pytest.raises(T2IError, match="2 processes can share equally but got 5"):
        World(0, 2).share(5)


def test_accelerate_launch_trains_like_one_process(cli, tmp_path, monkeypatch):
    """The command as a user types it, on a pipeline from a folder."""
    from tests.test_scoring_resume import ACCELERATE, launch

    torch.manual_seed(0)
    FAMILIES["sd"]().pipe.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(LAUNCHED))
    code, out, err = cli("train", "run.yaml", "out=one", "--json")
    assert code == 0, err
    done = launch(["train", "run.yaml", "out=two", "--json"], tmp_path, *ACCELERATE.split())
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = json.loads(out), json.loads(done.stdout)  # one process speaks
    assert together["step"] == alone["step"] == 2
    assert together["kept"]["reward"] == pytest.approx(alone["kept"]["reward"], rel=1e-4)
    same_numbers(tmp_path / "one", tmp_path / "two")
    assert len(rows(tmp_path / "two")) == 2
    one, two = (load_file(f"{name}/lora/pytorch_lora_weights.safetensors") for name in ("one", "two"))
    moved = [name for name in one if ".lora_B." in name or ".lora.up." in name]
    assert moved
    for name in moved:
        assert one[name].abs().sum() > 0
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-5)
