"""The data sets: what they are and how they are made (no loader code lives here)."""
