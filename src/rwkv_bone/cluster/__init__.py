"""The processes of a run: how they find one another, what they must agree on, and how they watch over one another."""
