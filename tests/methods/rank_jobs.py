"""Small trainings that ranks do, each rank a process that torchrun might have started; imported by these processes."""

import copy
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from small import ACMR_SMALL, ALPHA, EPS, small_dataset

from cmr_fast.data import load_captions, stream_captions
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods._ranks import RankLostError, Ranks
from cmr_fast.methods._shards import is_cut, shard, whole
from cmr_fast.methods.acmr import ACMR
from cmr_fast.methods.clip import Clip, ClipConfig
from cmr_fast.methods.cmimh import CMIMHConfig
from cmr_fast.methods.dcmh import DCMHConfig
from cmr_fast.methods.djsrh import DJSRHConfig
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.models.clip import dual_encoder

ON_FEATURES = ("acmr", "cmimh", "cmimh-samples", "djsrh")
ON_CAPTIONS = ("clip", "clip-chunk", "finetune", "finetune-chunk", "mat-img", "mat", "mmcoa", "fare", "leaf")
ON_STREAMS = ("clip-stream", "clip-stream-chunk", "finetune-stream")
FORMS = ("ring", "local")
SHARDED = ("clip", "clip-chunk", "finetune", "finetune-chunk")
ATTACKED = ("mat-img", "mat", "mmcoa", "fare", "leaf")


def job(name, place):
    """(method, config, data set) of a name; place holds towers and a masked LM."""
    method = name.partition("-")[0] if name != "mat-img" else name
    if name in ON_FEATURES:
        small = {"bits": 8, "hidden": 12, "critic_hidden": 8, "critic_dim": 6, "epochs": 4, "batch_size": 14}
        configs = {
            "acmr": replace(ACMR_SMALL, epochs=4, batch_size=14, inner_steps=2),
            "cmimh": CMIMHConfig(**small),
            "cmimh-samples": CMIMHConfig(**small, critic_input="samples", critic_samples=2, marginals="permutation"),
            "djsrh": DJSRHConfig(bits=8, image_hidden=12, text_hidden=12, epochs=4, batch_size=14),
        }
        return method, configs[name], small_dataset()
    data = load_captions("shapes", count=60)
    if "stream" in name:  # shards of these, some photos broken
        held = place / "held"
        data = stream_captions(place / "shards", test=held, valid=held, size=32, buffer=20, broken="skip")
    chunk = {"chunk": 5} if name.endswith("chunk") else {}
    if method == "clip":
        towers = (place / "towers.txt").read_text()
        return method, ClipConfig(
            towers=towers, dim=8, hidden=8, dropout=0.0 if chunk else 0.3, epochs=3, head_epochs=1, batch_size=14,
            head_lr=1e-2, captions=2, **chunk,
        ), data  # fmt: skip
    attack = {} if method in ("finetune", "leaf") else {"eps": EPS, "alpha": ALPHA, "steps": 2}
    words = {"mlm": str(place / "mlm")} if method in ("mat", "mmcoa") else {}
    if name == "mat-img":
        attack["away"] = "infonce"
    kind = METHODS[method]
    rate = 1e-2 if method not in ("fare", "leaf") else 1e-3
    start = str(place / "start")
    # 48 images in batches of 15: a last one of three
    config = kind.Config(start=start, max_steps=5, batch_size=15, lr=rate, **attack, **words, **chunk)
    return method, kind.completed(config), data


def settings(out, **changes):
    return RunConfig(
        out=out, device="cpu", quiet=True, threads=1, checkpoint_seconds=0.0, patience=0, valid_fraction=0.0, **changes
    )


def curve(name, place, out, **changes):
    method, config, data = job(name.partition("+")[0], place)
    if name in ATTACKED:  # by signs of gradients, which in float32 rounding turns where they are nearly 0
        changes["precision"] = "64-true"
    return train(method, config, data, settings(out, **changes))


def join(rank, world, port):
    """Make this process one of `world` ranks, as torchrun would."""
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip


def curves(rank, world, port, place, names):
    join(rank, world, port)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # Lightning says how many ranks there are
    for name in names:
        form = name.partition("+")[2] or "gather"
        changes = {"strategy": "fsdp"} if form == "fsdp" else {"contrastive": form}
        run = curve(name, Path(place), Path(place) / f"{name} on {world}", **changes)
        assert run.rank == rank
        if rank == world - 1:
            torch.save((run.history, run.results), Path(place) / f"{name} on {world}, last rank.pt")


def killed(rank, world, port, place):
    """ACMR, whose last rank is killed as its third epoch begins; the others write down what they raise."""
    join(rank, world, port)
    begin = ACMR.begin_round

    def die(self, split, progress):
        if rank == world - 1 and progress >= 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, split, progress)

    ACMR.begin_round = die
    try:
        curve("acmr", place, place / "killed")
    except RankLostError as error:
        (place / f"lost {rank}.txt").write_text(str(error))


def resumed(rank, world, port, place):
    """The killed run goes on; beside it one that was not disturbed."""
    join(rank, world, port)
    for out in ("killed", "undisturbed"):
        curve("acmr", place, place / out, resume=True)


def crossing(rank, world, port, place):
    """clip by each strategy, cut off as its third epoch begins; of the sharded one by a kill of the last rank."""
    join(rank, world, port)
    begin, strategy = Clip.begin_round, "ddp"

    def die(self, split, progress):
        if progress >= 0.5:
            if strategy == "fsdp" and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if strategy == "ddp":
                raise KeyboardInterrupt
        begin(self, split, progress)

    Clip.begin_round = die
    with suppress(KeyboardInterrupt):
        curve("clip", place, place / "ddp", strategy=strategy)
    strategy = "fsdp"
    try:
        curve("clip", place, place / "fsdp", strategy=strategy)
    except RankLostError as error:
        (place / f"lost {rank}.txt").write_text(str(error))


def crossed(rank, world, port, place):
    """Both go on by either strategy, beside one that was not disturbed; how much this rank holds of the towers."""
    join(rank, world, port)
    step, held = Clip.step, []

    def weigh(self, batch, optimizers, *rest):
        logged = step(self, batch, optimizers, *rest)
        held.clear()
        for optimizer in (optimizers["image"], optimizers["text"]):
            for p, state in optimizer.state.items():
                kept = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                held.append([p.numel(), *(x.to_local().numel() for x in kept)])
        return logged

    for out, strategy in (("ddp", "fsdp"), ("fsdp to ddp", "ddp"), ("fsdp", "fsdp")):
        curve("clip", place, place / out, strategy=strategy, resume=True)
    Clip.step = weigh
    curve("clip", place, place / "undisturbed", strategy="fsdp")
    torch.save(torch.tensor(held).sum(dim=0), place / f"held {rank}.pt")


def of_libraries(rank, world, port, place):
    """A step of SGD of models of open_clip and transformers, sharded, beside that of a replica; what differs most."""
    join(rank, world, port)
    dist.init_process_group("gloo")
    import open_clip

    open_clip.add_model_config(place)
    apart = {}
    for name in (
        *(f"open_clip/{file.stem}" for file in sorted(place.glob("*.json"))),
        f"transformers/{place / 'clip'}",
    ):
        torch.manual_seed(0)
        replica = dual_encoder(name).requires_grad_(True)
        sharded = copy.deepcopy(replica)
        shard(sharded.towers(), Ranks(rank, world))
        cut = [is_cut(p) for p in sharded.parameters()]
        pixels = torch.rand(4, 3, 32, 32)[2 * rank : 2 * rank + 2]
        for model in (sharded, replica):
            for texts in (["two cats", "a dog"], ["a red ball"]):  # each gathers the tower anew
                loss = (model.encode_image(pixels).sum(dim=0) * model.encode_text(*model.tokenize(texts))).sum()
                ((rank + 1) * model.scale * loss).backward()
            Ranks(rank, world).average(p for p in model.parameters() if not is_cut(p))
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        pairs = zip(map(whole, sharded.state_dict().values()), replica.state_dict().values(), strict=True)
        apart[name] = max(float((a - b).abs().max()) for a, b in pairs), sum(cut), len(cut)
    torch.save(apart, place / f"apart {rank}.pt")


def refused(rank, world, port, place):
    """Trainings that ranks may not begin; what each rank raises goes to a file of its own."""
    join(rank, world, port)
    plain = replace(ACMR_SMALL, epochs=1)
    (place / "used").mkdir(exist_ok=True)
    (place / "used" / "file").touch()
    cases = {
        "config": ("acmr", replace(plain, learning_rate=0.01 * (rank + 1)), small_dataset(), {}),
        "data": ("acmr", plain, small_dataset(seed=rank), {}),
        "seed": ("acmr", plain, small_dataset(), {"seed": rank}),
        "fsdp": ("acmr", plain, small_dataset(), {"strategy": "fsdp"}),
        "dcmh": ("dcmh", DCMHConfig(epochs=1), small_dataset(), {}),
        "used": ("acmr", plain, small_dataset(), {}),
    }
    for case, (method, config, data, changes) in cases.items():
        try:
            train(method, config, data, settings(place / case, **changes))
        except InputError as error:
            (place / f"{case} {rank}.txt").write_text(str(error))
