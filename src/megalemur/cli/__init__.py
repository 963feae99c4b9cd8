"""Parse, call, exit code. No logic."""
