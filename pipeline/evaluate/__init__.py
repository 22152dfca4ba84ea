"""Evaluation: held-out loss, greedy answers and their scores, and conversations.

In: a model and a prepared held-out split, or run folders and models. Out: the held-out loss, or the
contents of score.json, which compare the models on the same rows.
Open score.py first. subjects.py names the models, rows.py the rows, generate.py answers them, and
measures.py computes the scores; heldout.py computes the loss in training.
"""
