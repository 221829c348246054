"""All pairs of codes in a process of its own: `python join_peer.py CODES.npy RADIUS THREADS`.

Prints the number of pairs and the most memory that the process held, in MB.
"""

import sys
from pathlib import Path

import numpy as np


def main() -> None:
    import cmr_fast as cf

    codes, radius, threads = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    lims, _, _ = cf.hamming_pairs(codes, radius, threads=threads)
    status = Path("/proc/self/status").read_text()  # of this program alone; getrusage's begins with its parent's
    print(int(lims[-1]), int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


if __name__ == "__main__":
    main()
