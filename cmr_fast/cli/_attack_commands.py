"""What `cmr-fast attack`, and `report` on classifiers, do."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmr_fast._files import write_aside
from cmr_fast.cli._commands import free, load_classified, open_run, present, source_of
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.cli import main as cli
    from cmr_fast.data.images import ImageDataset
    from cmr_fast.methods.loop import Method

EPS = 8 / 255
DEFAULT = ("clean", "pgd20", "apgd-dlr")


def attack(arguments: "cli.Attack") -> None:
    from cmr_fast.methods.loop import load_model

    present(arguments.trained)
    if arguments.save is not None:
        if arguments.save.suffix != ".npz" or not arguments.save.parent.is_dir():
            raise InputError(f"{arguments.save}: expected the name of an .npz in a folder that is there")
        free(arguments.save, arguments.force)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"{arguments.out}: is a file, expected a folder to write")
    model = load_model(arguments.trained)
    (_attack_classifier if model.output == "logits" else _attack_retriever)(arguments)


def _attack_classifier(arguments: "cli.Attack") -> None:
    from cmr_fast.reports import robustness

    if arguments.restarts != 1:
        raise InputError(
            f"--restarts is for retrievers; of a classifier's attack it is in the name, like pgd20x{arguments.restarts}"
        )
    model, dataset = open_classifier(arguments.trained, arguments)
    eps = _eps(model, arguments.eps)
    settings = robustness.Settings(
        eps=eps, images=arguments.images, batch=arguments.batch, seed=arguments.seed, fast=arguments.fast
    )
    robustness.check_names(arguments.attacks)
    x, y = robustness.pixels_of(dataset.test, settings.images)
    surrogate = _surrogate(arguments.surrogate, arguments)
    found = robustness.attack_all(
        model, x, y, arguments.attacks, settings, surrogate=surrogate, keep=arguments.out, title="attacking"
    )
    title = f"{arguments.trained}: {len(x)} test images of {dataset.name}, eps {eps * 255:.3g}/255"
    robustness.print_outcomes(title, {"accuracy": found})
    if arguments.save is not None:
        _save(arguments, model, x, y, settings, surrogate)


def _save(arguments: "cli.Attack", model: Any, x: Any, y: Any, settings: Any, surrogate: Any) -> None:
    import numpy as np
    import torch

    from cmr_fast.reports import robustness

    assert arguments.save is not None
    name = robustness.split_restarts(arguments.attacks[-1])[0]
    atk = robustness.attack_named(name, model, settings, settings.seed, surrogate)
    rows = torch.arange(len(x)).split(settings.batch)
    adversarial = x if atk is None else torch.cat([atk(x[r], y[r], index=r) for r in rows])
    with write_aside(arguments.save) as aside, open(aside, "wb") as file:
        np.savez(file, images=x.numpy(), labels=y.numpy(), adversarial=adversarial.numpy())
    print(f"{arguments.save}: {len(x)} images and what {name} made of them")


def _attack_retriever(arguments: "cli.Attack") -> None:
    """Image features are the queries, all texts of the database the gallery."""
    import torch

    from cmr_fast.ops.labels import share_label
    from cmr_fast.reports import recall as robust_recall

    if arguments.save is not None or arguments.attacks != DEFAULT:
        raise InputError(
            "--save and --attacks are for classifiers; a retriever is attacked by PGD and APGD on the ranking"
        )
    share = EPS if arguments.eps is None else arguments.eps
    if not 0 < share <= 1:
        raise InputError(f"--eps must be above 0 and at most 1, a share of the features' range, got {share}")
    out = arguments.out
    if out is not None and (out / "README.md").exists() and not arguments.force:
        raise InputError(f"{out}: holds a report already; --force writes over it")
    model, dataset = open_run(arguments.trained, arguments)
    query, database = dataset.query, dataset.database
    rows = torch.arange(min(arguments.images, len(query)))
    relevant = share_label(query.labels[rows], database.labels)
    there = relevant.any(dim=1)
    x = query.image[rows].float()[there]
    low, high = float(query.image.min()), float(query.image.max())
    surrogate = None
    if arguments.surrogate is not None:
        other = open_run(arguments.surrogate, arguments)[0]
        if other.output != model.output:
            raise InputError(
                f"{arguments.surrogate}: makes {other.output}s, expected {model.output}s as the victim does"
            )
        surrogate = robust_recall.queried(other, database.text)
    encoder, gallery = robust_recall.queried(model, database.text)
    found = robust_recall.examine(
        encoder, x, gallery, relevant[there],
        eps=share * (high - low), bounds=(low, high), restarts=arguments.restarts, surrogate=surrogate,
        codes=model.output == "code", batch=arguments.batch, seed=arguments.seed, check=False,
    )  # fmt: skip
    title = f"{model.name} on {dataset.name}, image features within {share:.3g} of their range"
    robust_recall.print_report(found, f"{title}: {len(x)} queries, {len(database)} texts, clean")
    if out is not None:
        robust_recall.write_report({model.name: found}, out, title, share * (high - low))
        print(f"\nReport: {out / 'index.html'}")


def report(arguments: "cli.Report") -> None:
    """The robustness report of classifiers."""
    from cmr_fast.reports import robustness

    out = arguments.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder to write")
    if (out / "README.md").exists() and not arguments.force:
        raise InputError(f"{out}: holds a report already; --force writes over it")
    opened = [(path, *open_classifier(path, arguments)) for path in arguments.runs]
    if len({dataset.name for _, _, dataset in opened}) > 1:
        raise InputError("classifiers of one report must be of one data set; expected runs on the same --data")
    eps = _eps(opened[0][1], arguments.eps)
    settings = robustness.Settings(eps=eps, images=arguments.images, fast=arguments.fast)
    if arguments.attacks:
        robustness.check_names(arguments.attacks)
    surrogate = _surrogate(arguments.surrogate, arguments)
    found = []
    for name, (_, model, dataset) in zip(_names(arguments.runs), opened, strict=True):
        x, y = robustness.pixels_of(dataset.test, settings.images)
        names = list(arguments.attacks) or None
        found.append(
            robustness.examine(
                name, model, x, y, settings, names=names, surrogate=surrogate, keep=out / "attacks" / name
            )
        )
    dataset = opened[0][2]
    title = f"{dataset.name}, eps {eps * 255:.3g}/255"
    robustness.write_report(found, out, title, settings)
    robustness.print_outcomes(f"Accuracy, {title}", {r.name: r.outcomes for r in found})
    for one in found:
        print(f"\n{one.name}: {one.verdict()}")
    print(f"\nReport: {out / 'index.html'}")


def open_classifier(trained: Path, flags: Any) -> "tuple[Method, ImageDataset]":
    """The classifier of a run, and the images that `flags` ask for (None: its own)."""
    from cmr_fast.methods.loop import load_model

    present(trained)
    model = load_model(trained)
    if model.output != "logits":
        raise InputError(f"{trained}: a retriever ({model.name}), expected a classifier (scatter)")
    dataset = load_classified(*source_of(trained, flags))
    if dataset.num_classes != model.num_classes:
        raise InputError(f"{trained}: has {model.num_classes} classes, {dataset.name} has {dataset.num_classes}")
    return model, dataset


def _eps(model: "Method", asked: float | None) -> float:
    return asked if asked is not None else getattr(model.config, "eps", 0.0) or EPS


def _surrogate(path: Path | None, flags: Any) -> "Method | None":
    if path is None:
        return None
    from cmr_fast.methods.loop import load_model

    present(path)
    model = load_model(path)
    if model.output != "logits":
        raise InputError(f"{path}: a retriever ({model.name}), expected a classifier as the surrogate")
    return model


def _names(runs: tuple[Path, ...]) -> list[str]:
    """Folder names, with their parents' where two are the same."""
    names = [path.name if path.is_dir() else path.parent.name for path in (p.resolve() for p in runs)]
    if len(set(names)) == len(names):
        return names
    longer = [f"{path.parent.name}-{name}" for path, name in zip((p.resolve() for p in runs), names, strict=True)]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{number + 1}-{name}" for number, name in enumerate(names)]
