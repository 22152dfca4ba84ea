"""Evaluation: held-out loss, greedy generation and exact match.

In: a model and a prepared held-out split, or a finished run folder. Out: the held-out loss, or the
contents of score.json, which compare base, adapter and merged model.
Open score.py first. heldout.py computes the loss, also for training; generate.py the answers.
"""
