"""`cmr-fast evaluate`: mAP of a run, or of codes or embeddings in files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from cmr_fast._terminal import busy, new_table, show
from cmr_fast.cli.common import (
    DataFlags,
    check_output,
    load_run,
    naming,
    open_run,
    read_array,
    reads_captions,
    refuse_flags,
)
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.methods.method import Method

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluate(DataFlags):
    """mAP of a trained run, or of your own codes or embeddings, under a named convention and tie rule; R@K of captions.

    Example:  cmr-fast evaluate runs/acmr-wikipedia-seed0 --convention every --k 50

    Example:  cmr-fast evaluate --query-codes q.npy --database-codes d.npy --query-labels a.npy --database-labels b.npy
    """

    trained: Positional[Path | None] = None
    """Run folder, or model.safetensors. None: the four files below."""
    query_codes: Path | None = None
    """.npy of the queries: packed codes uint8 (Q, bytes), or embeddings float (Q, d)."""
    database_codes: Path | None = None
    """.npy of the database, of the same kind."""
    query_labels: Path | None = None
    """.npy of labels: int (Q,) class ids or 0/1 (Q, C); relevant means at least one label shared."""
    database_labels: Path | None = None
    """.npy of the database's labels."""
    metric: Literal["cosine", "l2", "ip"] | None = None
    """How embeddings from files are compared. None: cosine."""
    bits: int | None = None
    """Length of codes from files. None: 8 x bytes."""
    convention: str = "all"
    """How AP is defined: all, topk_hits, topk_R, topk_min, map_at_r, first_k_hits, hits_skip, sephfamily; or every."""
    ties: str = "index"
    """How equal distances are ranked: index, tie_aware, optimistic, pessimistic, threshold; or every."""
    k: int | None = None
    """Cut of the ranking (mAP@k). None: the whole ranking."""
    out: Path | None = None
    """JSON file to write the table to."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.methods._runfolder import write_json
        from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, find_convention, find_ties

        if self.out is not None:
            data = None if self.trained is None else self.data_of(self.trained)
            check_output(self.out, self.force, self.trained, data, *(getattr(self, name) for name in _FILES))
        if self.trained is not None and reads_captions(model := load_run(self.trained)):
            self._captions(model, self.trained)
            return
        conventions = CONVENTIONS if self.convention == "every" else (self.convention,)
        ties = TIES if self.ties == "every" else (self.ties,)
        settings = [{"convention": c, "ties": t, "k": self.k} for c in conventions for t in ties]
        title, rows = self._rows(settings)
        cut = "the whole ranking" if self.k is None else f"k = {self.k}"
        columns = [name for name in rows[0] if name not in ("convention", "ties", "k")]
        table = new_table("convention", "ties", "average precision of a query")
        for name in columns:
            table.add_column(name, justify="right")
        for row in rows:
            convention, rule = find_convention(row["convention"]), find_ties(row["ties"])
            table.add_row(convention.name, rule, convention.formula, *(_number(row[name]) for name in columns))
        show(f"mAP, {cut}: {title}", table)
        if any(row[name] is None for row in rows for name in columns):
            print("-: not defined, since which queries count would depend on the order of ties")
        if self.out is not None:
            write_json(self.out, rows)
            print(f"{self.out}: {len(rows)} rows")

    def _captions(self, model: "Method", trained: Path) -> None:
        from cmr_fast.methods._runfolder import write_json
        from cmr_fast.methods.evaluation import caption_results, recalls
        from cmr_fast.reports.captions import print_results

        changed = {name: getattr(self, name) for name in ("metric", "bits", "k", *_FILES)}
        changed |= {name: getattr(self, name) != getattr(Evaluate, name) for name in ("convention", "ties")}
        refuse_flags(changed, "is for mAP; a run on captions has R@K, ranks and rsum")
        dataset = self.captions_of(model, trained)
        with busy("evaluating"):
            results = caption_results(recalls(model, dataset.test))
        print_results({model.name: results}, f"{model.name} on {dataset.name}, test split")
        if self.out is not None:
            write_json(self.out, results)
            print(f"{self.out}: R@K and ranks")

    def _rows(self, settings: Rows) -> tuple[str, Rows]:
        files = {name: getattr(self, name) for name in _FILES}
        if self.trained is not None:
            if any(files.values()):
                raise InputError("expected a run folder or the four files, got both")
            refuse_flags({"metric": self.metric, "bits": self.bits}, "is for codes from files; a run knows its own")
            return _rows_of_run(self.trained, self, settings)
        if missing := [name for name, file in files.items() if file is None]:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise InputError(f"expected a run folder, or codes and labels of queries and database; not given: {flags}")
        sources = {"data": self.data, "features": self.features, "options": self.options}
        refuse_flags(sources, "is for a run; the four files are the data")
        return _rows_of_files(self, list(files.values()), settings)


_FILES = ("query_codes", "database_codes", "query_labels", "database_labels")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rows_of_run(trained: Path, flags: DataFlags, settings: Rows) -> tuple[str, Rows]:
    from cmr_fast.methods.evaluation import averaged, evaluate_many

    model, dataset = open_run(trained, flags)
    with busy("evaluating"):
        results = evaluate_many(model, dataset, settings)
    refused = [result for result in results if isinstance(result, InputError)]
    if len(refused) == len(results):
        raise refused[-1]
    rows = []
    for setting, result in zip(settings, results, strict=True):
        means: dict[str, Any] = dict.fromkeys(("i2t", "t2i", "average"))
        if not isinstance(result, InputError):
            means = averaged(result)
        rows.append(setting | {"I2T": means["i2t"], "T2I": means["t2i"], "average": means["average"]})
    return f"{model.name} on {dataset.name}", rows


def _rows_of_files(flags: Evaluate, files: list[Path], settings: Rows) -> tuple[str, Rows]:
    from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

    queries, database, query_labels, database_labels = arrays = [read_array(path) for path in files]
    for path, array, labels in zip(files[:2], arrays[:2], arrays[2:], strict=True):
        if len(array) != len(labels):
            raise InputError(f"{path}: {len(array)} rows, but {len(labels)} labels; expected one per row")
    embeddings = queries.dtype.kind == "f"
    if embeddings != (database.dtype.kind == "f"):
        kinds = [f"{path} holds {array.dtype}" for path, array in zip(files[:2], arrays[:2], strict=True)]
        raise InputError(f"{', '.join(kinds)}: expected embeddings in both (float), or packed codes in both (uint8)")
    if embeddings:
        refuse_flags({"bits": flags.bits}, f"is the length of codes; {files[0]} holds embeddings")
    else:
        refuse_flags({"metric": flags.metric}, f"compares embeddings; {files[0]} holds codes")
    words = ("query" if embeddings else "q", "database" if embeddings else "db", "q_labels", "db_labels")
    names = dict(zip(words, files, strict=True))
    rows = []
    for setting in settings:
        with busy("evaluating"), naming(**names):
            both = query_labels, database_labels
            if embeddings:
                metric = flags.metric or "cosine"
                result = evaluate_embeddings(queries, database, *both, metric=metric, **setting)
            else:
                result = evaluate_codes(queries, database, *both, bits=flags.bits, **setting)
        rows.append(setting | {"mAP": result.map})
    return f"{len(queries)} queries, {len(database)} in the database", rows
