"""Models in memory: the frozen base, its LoRA adapter, the attention and the loss.

In: a plan and a model folder. Out: a peft model whose loss DeepSpeed trains, and the hashes of the
base's tensors. Open base.py first (loading), then adapter.py (LoRA), attention.py (documents in
packed sequences) and loss.py. structure.py finds decoder, blocks and experts of any model class.
proof.py checks on a small copy of a model that its class can be trained correctly.
"""
