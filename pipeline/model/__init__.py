"""Models in memory: the frozen base, its LoRA adapter, the attention and the loss.

In: a plan and a model folder. Out: a peft model whose loss DeepSpeed trains, and the content hashes
of the base. Open base.py first (loading), then adapter.py (LoRA), attention.py (documents in packed
sequences) and loss.py. structure.py finds the parts of any model class; proof.py checks a class on
a small copy; fingerprint.py hashes the tensors whose offsets tensor_files.py reads.
"""
