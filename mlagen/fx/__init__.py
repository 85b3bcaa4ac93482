"""Graphs of torch.compile: operators for the halves of the prologue."""
