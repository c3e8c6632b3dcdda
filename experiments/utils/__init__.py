"""Small things that any part of the research code may use."""
