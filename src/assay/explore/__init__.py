"""The explorer: a local page where budgets are dragged and plans change at once."""
