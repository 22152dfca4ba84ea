"""Evaluation: held-out loss, greedy generation and exact match.

In: a model and a prepared held-out split, or a finished run folder. Out: the mean held-out loss
during training, and score.json, which compares base, adapter and merged model.
Open score.py first; heldout.py is the loss that training uses too, generate.py the answers.
"""
