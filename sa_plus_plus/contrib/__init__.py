"""Support for single frameworks; each module imports its framework only when it is used."""
