"""Strategies that shard student and teacher."""
