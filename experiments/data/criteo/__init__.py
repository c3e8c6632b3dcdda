"""Criteo's display-advertising data: `python -m experiments.data.criteo prepare` writes what `criteo` reads."""

from experiments.data.criteo.prepared import Criteo, criteo

__all__ = ["Criteo", "criteo"]
