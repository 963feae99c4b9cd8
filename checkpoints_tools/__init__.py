"""Conversion of checkpoints between formats, and the proof that nothing changed on the way.

A format says where each box of each Hugging Face tensor lies in its files (`regions`), to be read or to be written. The
rest is one engine for all of them: read rows, change them where asked for, digest, write, read back, certify.
"""
