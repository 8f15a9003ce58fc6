"""Training of the boxed reasoner, whose checkpoint comes with the package."""
