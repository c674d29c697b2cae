"""Doc-to-LoRA: internalise a document into a LoRA adapter of a frozen language model.

The public surface is `d2l.model.DocToLoRA`, `d2l.checkpoint` and `d2l.lm.base.load_base`; importing
this package loads nothing heavy.
"""
