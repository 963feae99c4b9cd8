"""The whole way of the data on one machine, by the commands that a user types; each stage shows its proof."""
