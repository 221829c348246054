"""Codes out of a bit column of sqlite-vec: read them with their ids, search, and find what the database finds.

pip install sqlite-vec; Python's sqlite3 must load extensions
python examples/sqlite_vec_codes.py
"""

import sqlite3
from collections.abc import Iterable

import numpy as np
import sqlite_vec

import cmr_fast as cf

BITS = 64


def index_of(rows: Iterable[tuple[int, bytes]]) -> cf.HammingIndex:
    """An index of rows (id, code): sqlite-vec's bit vectors are packed as pack_codes packs."""
    ids, codes = zip(*rows, strict=True)
    index = cf.HammingIndex(BITS)
    index.add(np.frombuffer(b"".join(codes), np.uint8).reshape(len(ids), -1), ids=np.array(ids))
    return index


def main() -> None:
    rng = np.random.default_rng(0)
    codes = cf.pack_codes(rng.standard_normal((5000, BITS)))
    ids = rng.permutation(100_000)[: len(codes)].tolist()

    database = sqlite3.connect(":memory:")
    database.enable_load_extension(True)
    sqlite_vec.load(database)
    database.execute(f"create virtual table items using vec0(id integer primary key, code bit[{BITS}])")
    pairs = zip(ids, map(bytes, codes), strict=True)
    database.executemany("insert into items (id, code) values (?, vec_bit(?))", pairs)

    index = index_of(database.execute("select id, code from items"))
    print(f"read {index.ntotal} codes")

    query = codes[7:8]
    distances, found = index.search(query, k=10)
    print("ten nearest:", found[0].tolist(), "at", distances[0].tolist())
    theirs = database.execute(
        "select id, distance from items where code match vec_bit(?) and k = 10 order by distance", [query.tobytes()]
    ).fetchall()
    print("sqlite-vec:", [i for i, _ in theirs], "at", [int(d) for _, d in theirs])  # ties in another order


if __name__ == "__main__":
    main()
