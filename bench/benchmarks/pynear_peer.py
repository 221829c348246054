"""pynear's MIHBinaryIndex in a process of its own: `python pynear_peer.py CODES.npy QUERIES.npy K RADIUS`.

Reads orders from stdin, a line each: `search`, `build N` (tables over the first N codes anew), `save PATH`; answers
each with a line.
"""

import sys

import numpy as np


def main() -> None:
    import pynear

    codes, queries, k, radius = np.load(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

    def build(count: int) -> "pynear.MIHBinaryIndex":
        index = pynear.MIHBinaryIndex(8)
        index.set(codes[:count])
        return index

    index, found = build(len(codes)), None
    print("ready", flush=True)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "search":
            found = index.searchKNN_arrays(queries, k, radius)
        elif order == "build":
            build(int(argument))
        elif order == "save":
            np.savez(argument, ids=found[0], distances=found[1])
        print("done", flush=True)


if __name__ == "__main__":
    main()
