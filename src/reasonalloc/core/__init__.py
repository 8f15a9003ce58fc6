"""One layer under a budget: when it is compressed, which tokens stay, what is observed."""
