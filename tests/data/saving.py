"""Files as other programs write them."""

import h5py
import numpy as np


def save_matlab73(file, arrays):
    """As MATLAB does: a block of 512 bytes before the HDF5 part, and all axes in the other order."""
    with h5py.File(file, "w", userblock_size=512) as opened:
        for key, value in arrays.items():
            opened[key] = np.asarray(value).T
    with open(file, "r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2018 HDF5 schema 1.00 .")


def save_h5(file, arrays):
    with h5py.File(file, "w") as opened:
        for key, value in arrays.items():
            opened[key] = value
