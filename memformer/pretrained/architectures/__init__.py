"""One module per family: its config both ways, and the rules of its weights."""
