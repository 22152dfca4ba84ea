"""Evaluation: held-out loss, greedy answers and their scores, and conversations.

Input: a model and a prepared held-out split, or run folders and models. Output: the held-out loss,
or the contents of score.json, which compare the models on the same rows. Open score.py first.
model_specs.py lists the models, rows.py encodes the rows, generate.py generates answers, and
measures.py computes the scores. heldout.py computes the held-out loss during training.
"""
