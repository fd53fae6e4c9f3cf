"""Scorers of answers: by rules in a Python file, by a reward model from a folder, by a judge at a URL.

Each takes answers with their conversations and gives a `Score` for each as soon as it is there; `score_file.py` keeps
and writes them.
"""
