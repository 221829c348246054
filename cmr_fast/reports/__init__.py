"""Reports: tables, figures and verdicts from trained runs."""
