"""Small trainings that ranks do, each rank a process that torchrun might have started; imported by these processes."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from small import ACMR_SMALL, ALPHA, EPS, small_dataset

from cmr_fast.data import load_captions, stream_captions
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods._ranks import RankLostError
from cmr_fast.methods.acmr import ACMR
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.cmimh import CMIMHConfig
from cmr_fast.methods.dcmh import DCMHConfig
from cmr_fast.methods.djsrh import DJSRHConfig
from cmr_fast.methods.loop import RunConfig, train

ON_FEATURES = ("acmr", "cmimh", "cmimh-samples", "djsrh")
ON_CAPTIONS = ("clip", "clip-chunk", "finetune", "finetune-chunk", "mat-img", "mat", "mmcoa", "fare", "leaf")
ON_STREAMS = ("clip-stream", "clip-stream-chunk", "finetune-stream")
FORMS = ("ring", "local")
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
        run = curve(name, Path(place), Path(place) / f"{name} on {world}", contrastive=form)
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
