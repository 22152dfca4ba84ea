"""Readers of data files: files -> rows -> examples, without torch.

In: the values of `train_data` and `eval_data`. Out: for each row an Example (conversation, prompt
and completion, text, or tokens) and the names of the columns that were not read. For a bad row the
result is its file, its line and the reason. The plan's size estimate and prepare use the same
readers.

Open `sources.py` first. `files.py` finds the files and `content.py` decompresses them.
`json_rows.py`, `csv_rows.py` and `tables.py` split a file into Lines, which are unparsed rows.
`formats.py`, `conversations.py` and `messages.py` build the examples.
"""
