"""From a config to a trainer, a module and data, and back from a run folder."""
