"""The CUDA side of the ops: launches into cmr_fast._cuda."""
