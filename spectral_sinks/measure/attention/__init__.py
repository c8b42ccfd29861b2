"""Attention received by every position. The passes that show it, whole or block by block."""
