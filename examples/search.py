"""Search binary codes: pack, index, save, open again, ask for neighbours, for a radius, and for mAP.

python examples/search.py
"""

import tempfile
from pathlib import Path

import numpy as np

import cmr_fast as cf


def main() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, 64))
    labels = rng.integers(0, 10, 20_000)
    items = centres[labels] + rng.standard_normal((20_000, 64))  # embeddings: of your network, usually

    codes = cf.pack_codes(items, threshold=0.0)  # uint8 (20000, 8): the bytes that faiss's binary indexes use too
    queries, database = codes[:100], codes[100:]

    index = cf.HammingIndex(64)
    index.add(database)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.cmrx"
        index.save(path)
        opened = cf.HammingIndex.load(path, mmap=True)  # at once, whatever its size

        distances, ids = opened.search(queries, k=5)
        print("five nearest of query 0:", ids[0].tolist(), "at", distances[0].tolist())

        lims, distances, ids = opened.range_search(queries, 12)  # distance <= 12; faiss would say 13
        print("within 12 bits of query 0:", int(lims[1] - lims[0]), "items")

        index.to_faiss(Path(folder) / "items.faiss")  # and back: HammingIndex.from_faiss
        del opened  # a mapped file stays open as long as its index

    result = cf.evaluate_codes(queries, database, labels[:100], labels[100:], ties="tie_aware")
    print(f"mAP {result.map:.3f}")


if __name__ == "__main__":
    main()
