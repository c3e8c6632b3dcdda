"""`python -m sa_plus_plus plan`, `one-shot` and `report`: what can be done with any checkpoint."""
