"""Adapters: gathered from the ZeRO engine, verified, published as a PEFT folder, merged.

In: a DeepSpeed engine, or an adapter folder and its base. Out: RUN/adapter and RUN/merged.
Open publish.py first. gather.py accesses ZeRO's optimizer state; verify.py checks tensors;
trained_on.py records the base; merge_inputs.py reads and checks the inputs of merge.py.
"""
