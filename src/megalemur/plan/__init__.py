"""What a run will hold, send and take, from its run file alone. Only dry_run.py and traced.py know torch."""
