"""What happened together, means the same or is recalled together; retrieval that follows it."""

from memopt.onuse import names_on_use

__getattr__ = names_on_use(__name__, {"association": ("AssociationGraph", "GraphRecipe")})
