"""`cmr-fast serve`: an index over HTTP, with health, metrics and a page to search with."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from cmr_fast._terminal import busy
from cmr_fast.cli.attack import CAPTIONS_EPS
from cmr_fast.cli.codes import open_index
from cmr_fast.cli.common import DataFlags, check_exists, check_least, load_run, naming, refuse_flags, split_of
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.serving.galleries import Gallery
    from cmr_fast.serving.searchable import Searchable


@dataclass(frozen=True, kw_only=True)
class Serve(DataFlags):
    """Answer searches over HTTP until Ctrl-C or SIGTERM, when requests that are under way finish.

    Example:  cmr-fast serve db.cmrx

    Example:  cmr-fast serve shards --ray local --replicas 2

    Example:  cmr-fast serve images.cmrx --run runs/clip-flickr8k-seed0

    POST /search answers JSON such as {"codes": ["00ff00ff00ff00ff"], "k": 10} by distances and ids; a code is hex,
    base64 or a list of bytes, `radius` and `where` (ids) narrow the search. GET /health is 200 where all of the index
    answers, 503 where some does not; GET /metrics is for Prometheus; GET / is a page to search with.

    There is no password: whoever reaches the port may search. --host 127.0.0.1 is this machine alone.
    """

    index: Positional[Path]
    """Index file or folder of shards, from `cmr-fast index`."""
    run: Path | None = None
    """Run whose queries the index answers: captions and images (`train clip`), or rows of its test split."""
    items: Literal["image", "text"] = "image"
    """What the index holds: the codes that `cmr-fast encode RUN --modality` this wrote of the database."""
    eps: float | None = None
    """Radius of attacked images. None: 2/255 of pixels with captions, of other runs CMLA's share of the range."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    ray: str | None = None
    """Hold each shard in processes of a Ray cluster: its address, `auto` for the one this machine is in, or `local` to
    begin one here. None: search in this process."""
    replicas: int | None = None
    """With --ray: processes of each shard, so that one may die. None: 1."""
    partial: bool = False
    """With --ray: where a shard is lost, answer from the others and say what is missing; otherwise 503."""
    timeout: float = 30.0
    """With --ray: seconds after which a shard that has not answered counts as lost."""
    threads: int | None = None
    """CPU threads of a search. None: all that this process may use, of a shard its share of its machine."""
    most_requests: int = 64
    """Searches under way at once; beyond, 503 with Retry-After."""
    most_megabytes: int = 8
    """Of a request's body; beyond, 413."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast import serving

        check_least(
            port=(self.port, 0), replicas=(self.replicas, 1), threads=(self.threads, 1),
            most_requests=(self.most_requests, 1), most_megabytes=(self.most_megabytes, 1),
        )  # fmt: skip
        if self.port > 65535:
            raise InputError(f"--port must be 65535 or less, got {self.port}")
        if not self.timeout > 0:
            raise InputError(f"--timeout must be above 0 seconds, got {self.timeout:g}")
        if self.ray is None:
            refuse_flags({"replicas": self.replicas, "partial": self.partial}, "is for shards over --ray")
        check_exists(self.index)
        with serving.until_stopped(), ExitStack() as stack:
            listening = stack.enter_context(serving.listen(self.host, self.port))
            searched = self._opened(stack)
            app = serving.make_app(
                searched, self._gallery(searched), most_bytes=self.most_megabytes << 20,
                most_requests=self.most_requests,
            )  # fmt: skip
            host, port = listening.getsockname()[:2]
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            shards = f" in {searched.shards} shards" if searched.shards > 1 else ""
            print(f"{self.index}: {searched.count} codes of {searched.bits} bits{shards}", flush=True)
            print(f"http://{place} answers; Ctrl-C stops it", flush=True)
            serving.run(app, listening)
        print("stopped")

    def _opened(self, stack: ExitStack) -> "Searchable":
        from cmr_fast.distributed import ShardedIndex
        from cmr_fast.serving import InProcess, OverShards

        if self.ray is None:
            return InProcess(open_index(self.index), self.threads)
        if not self.index.is_dir():
            raise InputError(
                f"{self.index}: --ray is for a folder of shards, expected `cmr-fast index {self.index} --out FOLDER "
                "--shards 4` first"
            )
        join_ray(self.ray)
        sharded = ShardedIndex(self.index, replicas=self.replicas or 1, threads=self.threads, timeout=self.timeout)
        return OverShards(stack.enter_context(sharded), self.partial)

    def _gallery(self, searched: "Searchable") -> "Gallery | None":
        if self.run is None:
            flags = {"data": self.data, "features": self.features, "options": self.options, "eps": self.eps}
            refuse_flags(flags, "is for queries and items of a --run")
            return None
        from cmr_fast.methods.method import CaptionRetriever, Retriever
        from cmr_fast.serving.galleries import Captions, Features, check_items

        model = load_run(self.run)
        gallery: Gallery
        with busy(f"encoding the {self.items}s of the database"):
            if isinstance(model, CaptionRetriever):
                split = split_of(self.captions_of(model, self.run), "database", self.run)
                eps = CAPTIONS_EPS if self.eps is None else self.eps
                gallery = Captions(str(self.run), model, split, self.items, eps)
            else:
                dataset = self.pairs_of(model, self.run)
                assert isinstance(model, Retriever)
                gallery = Features(str(self.run), model, dataset, self.items, self.eps)
        with naming(the=self.index):
            check_items(gallery, searched, self.run)
        return gallery


def join_ray(address: str) -> None:
    """Join the Ray cluster of an address, or begin one on this machine (`local`). InputError where there is none."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'cmr-fast[dist]'") from error
    try:
        ray.init(address=address, include_dashboard=None if address != "local" else False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"--ray {address}: no Ray cluster answers there ({why}); `local` begins one here") from error
