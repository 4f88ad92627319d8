"""Generated tasks: seeded generators, each with its distribution, its best possible loss and its metric."""
