"""Adapters: out of the ZeRO engine, checked, published as a PEFT folder, merged into the base.

In: a DeepSpeed engine, or an adapter folder and its base. Out: RUN/adapter and RUN/merged.
Open publish.py first. gather.py is the access to ZeRO's optimizer state; verify.py checks tensors;
trained_on.py records the base; merge_inputs.py checks what merge.py merges.
"""
