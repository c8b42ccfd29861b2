"""Texts and images, and the inputs that models read from them: windows of token ids and batches of pixels."""
