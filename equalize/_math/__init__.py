"""Pure functions of tensors: means, penalties, symmetries, factors."""
