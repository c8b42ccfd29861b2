"""Texts, images, and what models read of them: windows of token ids and batches of pixels."""
