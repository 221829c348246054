"""Attacks on images and their captions at once: Co-Attack, SGA."""
