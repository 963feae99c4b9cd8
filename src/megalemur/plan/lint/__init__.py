"""What is wrong with a run, known before it is launched: rules over a run file, and over the files that it names.

Never imports torch: it answers in seconds on a login node.
"""
