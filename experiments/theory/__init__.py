"""The paper's lemmas and theorems, checked on random and real problems."""
