"""Adapters: gathered from the ZeRO engine, verified, published as a PEFT folder, merged.

Input: a DeepSpeed engine, or an adapter folder and its base. Output: RUN_FOLDER/adapter and
RUN_FOLDER/merged.
Open publish.py first. gather.py reads and restores ZeRO's optimizer state; verify.py checks
tensors; trained_on.py records the base; adapter_file.py reads a PEFT folder. merge.py merges
adapters: merge_inputs.py and merge_plan.py check the inputs, merge_stream.py and merge_layer.py
compute and write the weights, merge_output.py writes the other files.
"""
