"""Papers' tables and figures redone, a module a paper."""
