"""Data files -> rows -> examples, without torch and without a plan.

In: the names in `train_data` and `eval_data`. Out: for each row an Example (conversation, prompt
and completion, text or tokens) and the columns that were not read; or, for a bad row, its file, its
line and the reason. The plan's size estimate and prepare use the same readers.
Open `sources.py` first: names -> `files.py` -> `content.py` (bytes) -> `json_rows.py`,
`csv_rows.py` or `tables.py` (Line objects) -> `formats.py`, `conversations.py`, `messages.py`
(examples).
"""
