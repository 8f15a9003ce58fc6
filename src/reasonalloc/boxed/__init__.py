"""The boxed reasoner: a tiny model that reasons, its training and its shipped checkpoint."""
