"""What only some frameworks need; each module imports its framework where it is used."""
