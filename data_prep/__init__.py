"""Command-line tools that turn text into indexed data sets. They never import torch."""
